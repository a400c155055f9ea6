package emulator

import (
	"fmt"
	"slices"
	"time"
)

// identifier is what Clerk shows of a person to others: the primary address, else the number.
func (l *life) identifier() string {
	u := l.user
	for i := range u.EmailAddresses {
		if u.PrimaryEmail != nil && u.EmailAddresses[i].ID == *u.PrimaryEmail {
			return u.EmailAddresses[i].EmailAddress
		}
	}
	if len(u.PhoneNumbers) > 0 {
		return u.PhoneNumbers[0].PhoneNumber
	}
	return ""
}

func (l *life) public() publicUserData {
	u := l.user
	return publicUserData{
		Banned: u.Banned, FirstName: u.FirstName, HasImage: u.HasImage, Identifier: l.identifier(), ImageURL: u.ImageURL,
		LastName: u.LastName, ProfileImageURL: gravatar, UserID: u.ID, Username: u.Username,
	}
}

func (o *organization) public() publicOrganizationData {
	return publicOrganizationData{HasImage: o.HasImage, ID: o.ID, ImageURL: o.ImageURL, Name: o.Name, Slug: o.Slug}
}

// found founds an organization, invites people, adds a domain, and keeps changing both.
func (l *life) found() {
	c := l.c
	if l.user.Banned {
		return
	}
	c.orgs++
	at := c.tick()
	o := &organization{
		AdminDelete: true, CreatedAt: at, CreatedBy: l.user.ID, ID: c.id("org"), LastActiveAt: at, MaxMemberships: 5, MembersCount: 1,
		Name: orgNames[c.orgs%len(orgNames)], Object: "organization", RoleSetKey: "role_set:default", Slug: fmt.Sprintf("org-%d", c.orgs),
	}
	o.ImageURL = c.avatar(o.ID)
	c.saveOrganization(o, l, "organization.created")
	c.newMembership(o, l, "org:admin")

	alive := func() bool { return len(o.members) > 0 }
	guests := 1 + c.rng.IntN(2)
	for i := range guests + 1 {
		l.later(time.Duration(i+1)*10*minute, func() {
			if alive() {
				l.invite(o, i < guests, i > 0 && c.chance(.1))
			}
		})
	}
	l.later(hour, func() {
		if alive() {
			o.Name += " Ltd"
			o.PublicMetadata = `{"tier":"gold","region":"eu-west"}`
			c.saveOrganization(o, l, "organization.updated")
			l.addDomain(o)
		}
	})
	l.later(8*hour, func() {
		if !alive() || len(o.members) < 2 {
			return
		}
		m := o.members[len(o.members)-1]
		m.Role, m.RoleName, m.Permissions, m.UpdatedAt = "org:admin", "Admin", adminPermissions, c.tick()
		m.Organization, m.PublicUserData = o.json, m.life.public()
		c.emit("organizationMembership.updated", m.ID, l, m.UpdatedAt, c.render(m))
		if c.chance(.5) {
			l.later(day, func() {
				if slices.Contains(o.members, m) && len(o.members) > 1 {
					c.endMembership(m, l)
				}
			})
		}
	})
}

func (c *Clerk) saveOrganization(o *organization, by *life, typ string) {
	o.UpdatedAt = c.tick()
	o.LastActiveAt = o.UpdatedAt
	o.json = c.render(o)
	c.emit(typ, o.ID, by, o.UpdatedAt, o.json)
}

func (c *Clerk) newMembership(o *organization, l *life, roleKey string) {
	at := c.tick()
	m := &membership{
		CreatedAt: at, UpdatedAt: at, ID: c.id("orgmem"), Object: "organization_membership", Organization: o.json,
		Permissions: memberPermissions, PublicUserData: l.public(), Role: roleKey, RoleName: "Member", org: o, life: l,
	}
	if roleKey == "org:admin" {
		m.Permissions, m.RoleName = adminPermissions, "Admin"
	}
	o.members = append(o.members, m)
	l.memberships = append(l.memberships, m)
	c.emit("organizationMembership.created", m.ID, l, at, c.render(m))
}

// endMembership ends a membership. Its event is a full object whose updated_at is that of its last change.
func (c *Clerk) endMembership(m *membership, by *life) {
	o := m.org
	isThis := func(other *membership) bool { return other == m }
	o.members = slices.DeleteFunc(slices.Clone(o.members), isThis)
	m.life.memberships = slices.DeleteFunc(slices.Clone(m.life.memberships), isThis)
	o.MembersCount = len(o.members)
	c.saveOrganization(o, by, "organization.updated")
	m.Organization = o.json
	c.emit("organizationMembership.deleted", m.ID, by, m.UpdatedAt, c.render(m))
}

// deleteOrganization deletes all that belongs to the organization, each with an event of its own, then itself.
// Whether Clerk sends all of these is not known.
func (c *Clerk) deleteOrganization(o *organization, by *life) {
	for _, i := range slices.Clone(o.invitations) {
		c.settle(i, o, by, "revoked")
	}
	for _, d := range o.domains {
		c.emitDeleted("organizationDomain.deleted", "organization_domain", d.ID, by, nil, "")
	}
	for _, m := range slices.Clone(o.members) {
		c.endMembership(m, by)
	}
	o.domains, o.members = nil, nil
	c.emitDeleted("organization.deleted", "organization", o.ID, by, nil, o.Slug)
}

func (l *life) dissolve() {
	for _, m := range slices.Clone(l.memberships) {
		if m.Role == "org:admin" {
			l.c.deleteOrganization(m.org, l)
			return
		}
	}
}

// invite invites somebody who signed up lately, or, where known is false or nobody fits, a stranger, whose
// invitation is revoked in the end.
func (l *life) invite(o *organization, known, declined bool) {
	c := l.c
	var guest *life
	for range 8 {
		if !known || len(c.recent) == 0 {
			break
		}
		other := c.recent[c.rng.IntN(len(c.recent))]
		if other.invited == nil && !other.user.Banned && !slices.ContainsFunc(o.members, func(m *membership) bool { return m.life == other }) {
			guest = other
			break
		}
	}
	address := "someone@" + hosts[c.rng.IntN(len(hosts))]
	if guest != nil {
		address = guest.address()
	}
	u := l.user
	at := c.tick()
	i := &invitation{
		CreatedAt: at, EmailAddress: address, ExpiresAt: at + (30 * day).Milliseconds(), ID: c.id("orginv"), InviterID: u.ID,
		Object: "organization_invitation", OrganizationID: o.ID, Role: "org:member", RoleName: "Member", Status: "pending", UpdatedAt: at,
		PublicInviterData: publicInviterData{
			FirstName: u.FirstName, HasImage: u.HasImage, Identifier: l.identifier(), ImageURL: u.ImageURL, LastName: u.LastName, UserID: u.ID,
		},
		PublicOrganizationData: o.public(), URL: "https://accounts.example.com/accept-invitation?__clerk_ticket=example",
	}
	o.invitations = append(o.invitations, i)
	o.PendingInvitations = len(o.invitations)
	c.emit("organizationInvitation.created", i.ID, l, at, c.render(i))
	c.saveOrganization(o, l, "organization.updated")

	open := func() bool { return slices.Contains(o.invitations, i) }
	if guest == nil || o.MembersCount >= o.MaxMemberships {
		l.later(5*hour, func() {
			if open() {
				c.settle(i, o, l, "revoked")
			}
		})
		return
	}
	guest.invited = i
	c.after(c.about(hour), func() {
		guest.invited = nil
		switch {
		case !open():
		case guest.gone || guest.user.Banned || declined:
			c.settle(i, o, l, "revoked")
		default:
			i.UserID = guest.user.ID
			o.MembersCount++
			c.settle(i, o, guest, "accepted")
			c.newMembership(o, guest, i.Role)
		}
	})
}

func (c *Clerk) settle(i *invitation, o *organization, by *life, status string) {
	o.invitations = slices.DeleteFunc(slices.Clone(o.invitations), func(other *invitation) bool { return other == i })
	o.PendingInvitations = len(o.invitations)
	c.saveOrganization(o, by, "organization.updated")
	i.Status, i.UpdatedAt, i.PublicOrganizationData = status, c.tick(), o.public()
	c.emit("organizationInvitation."+status, i.ID, by, i.UpdatedAt, c.render(i))
}

func (l *life) addDomain(o *organization) {
	c := l.c
	at := c.tick()
	d := &domain{
		AffiliationEmail: "admin@" + l.host, CreatedAt: at, EnrollmentMode: "automatic_invitation", ID: c.id("orgdmn"), Name: l.host,
		Object: "organization_domain", OrganizationID: o.ID, PublicOrganizationData: o.public(), UpdatedAt: at,
	}
	o.domains = append(o.domains, d)
	c.emit("organizationDomain.created", d.ID, l, at, c.render(d))
	there := func() bool { return slices.Contains(o.domains, d) }
	l.later(5*minute, func() {
		if !there() {
			return
		}
		d.UpdatedAt = c.tick()
		d.AffiliationVerification = &domainVerification{Attempts: 1, Status: "verified", Strategy: "affiliation_email_code", VerifiedAt: d.UpdatedAt}
		d.Verification, d.EnrollmentMode, d.PendingSuggestions = d.AffiliationVerification, "automatic_suggestion", 2
		d.PublicOrganizationData = o.public()
		c.emit("organizationDomain.updated", d.ID, l, d.UpdatedAt, c.render(d))
	})
	if c.chance(.4) {
		l.later(2*day, func() {
			if there() {
				o.domains = slices.DeleteFunc(slices.Clone(o.domains), func(other *domain) bool { return other == d })
				c.emitDeleted("organizationDomain.deleted", "organization_domain", d.ID, l, nil, "")
			}
		})
	}
}
