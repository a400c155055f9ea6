package emulator

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	minute = time.Minute
	hour   = time.Hour
	day    = 24 * time.Hour
)

// backend is the client of changes that the application made by the Backend API.
var backend = client{ip: "192.0.2.10", agent: "clerk/clerk-sdk-go@v2.0.0"}

var clients = []client{
	{ip: "203.0.113.", agent: "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/128.0.0.0 Safari/537.36", browser: "Chrome", version: "128.0.0.0", device: "Macintosh", city: "London", country: "GB"},
	{ip: "198.51.100.", agent: "Mozilla/5.0 (iPhone; CPU iPhone OS 18_1 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/18.1 Mobile/15E148 Safari/604.1", browser: "Mobile Safari", version: "18.1", device: "iPhone", mobile: true, city: "Berlin", country: "DE"},
	{ip: "192.0.2.", agent: "Mozilla/5.0 (X11; Linux x86_64; rv:131.0) Gecko/20100101 Firefox/131.0", browser: "Firefox", version: "131.0", device: "Linux", city: "Warszawa", country: "PL"},
	{ip: "203.0.113.", agent: "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/128.0.0.0 Safari/537.36 Edg/128.0.0.0", browser: "Edge", version: "128.0.0.0", device: "Windows", city: "São Paulo", country: "BR"},
	{ip: "198.51.100.", agent: "Mozilla/5.0 (Linux; Android 15; Pixel 9) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/128.0.0.0 Mobile Safari/537.36", browser: "Chrome Mobile", version: "128.0.0.0", device: "Android", mobile: true, city: "東京", country: "JP"},
}

var (
	firstNames = []string{"Ada", "Bob", "Grace", "Zoë", "Łukasz", "José", "Mei", "太郎", "Ольга", "Noor", "Søren", "Ifeoma", "Björk", "Siân", "Ngọc", "Dara"}
	lastNames  = []string{"Lovelace", "Hopper", "O'Neill", "Müller", "García", "山田", "Иванова", "Nguyễn", "van der Berg", "Şahin", "Smith-Jones", "Adeyemi"}
	latin      = []string{"ada", "bob", "grace", "zoe", "lukasz", "jose", "mei", "taro", "olga", "noor", "soren", "ifeoma", "bjork", "sian", "ngoc", "dara"}
	hosts      = []string{"example.com", "example.org", "example.net"}
	orgNames   = []string{"Acme Research", "Łódź Labs", "Blue <Bird> & Sons", "Café Zürich", "Northwind", "東京商会", "Initech", "Umbrella"}
	oddities   = []metadata{
		`{"bio":"naïve café 👩‍🚀 — “quoted”","tags":["a","b"],"score":12.5,"nothing":null}`,
		`{"bio":"مرحبا بالعالم","nested":{"deep":{"er":[1,2,{"x":true}]}},"big":12345678901234567890}`,
		`{"bio":"zero\u200bwidth, line\nbreak, tab\t, back\\slash","emoji":"🏳️‍🌈","html":"<b>&amp;</b>"}`,
		`{"theme":"dark","newsletter":true,"signup_source":"landing-page"}`,
	}
	freePlan = plan{Amount: 0, Currency: "USD", ID: "cplan_34e1PbLRpplRKciVduJRbDFfBtp", Name: "Free", Slug: "free_user"}
	proPlan  = plan{Amount: 2000, Currency: "USD", ID: "cplan_34e1Pdi7sMk9c9ITiSCh6Am6kKr", IsRecurring: true, Name: "Pro", Slug: "pro"}

	memberPermissions = []string{"org:sys_memberships:read"}
	adminPermissions  = []string{"org:sys_profile:manage", "org:sys_profile:delete", "org:sys_memberships:read", "org:sys_memberships:manage", "org:sys_domains:read", "org:sys_domains:manage"}
)

// gravatar is what Clerk still sends as profile_image_url of people without a picture.
const gravatar = "https://www.gravatar.com/avatar?d=mp"

func ptr[T any](v T) *T { return &v }

// life is one person, from before the sign-up until the account is deleted or the story ends.
type life struct {
	c      *Clerk
	user   *user // nil before the sign-up
	client client
	name   string // of the mailbox
	host   string

	open        []*session
	memberships []*membership
	invited     *invitation
	entry       *waitlistEntry

	sub       *subscription
	free, pro *item
	gone      bool
}

// chapter is something that happens in a life; it may let more happen later.
type chapter func(*life)

type script struct {
	waitlist, phone, google, pending bool
	chapters                         []chapter
}

// cast are the first twenty people, so that every event type occurs in a small story too.
var cast = []script{
	{waitlist: true, chapters: []chapter{(*life).onboard, (*life).found, (*life).upgrade, (*life).signOut}},
	{chapters: []chapter{(*life).onboard, (*life).addEmail, (*life).signOut}},
	{phone: true, chapters: []chapter{(*life).rename, (*life).removeSession, (*life).signIn}},
	{google: true, chapters: []chapter{(*life).onboard, (*life).cancelOnce, (*life).oddMetadata}},
	{pending: true, chapters: []chapter{(*life).addPhone, (*life).lock}},
	{waitlist: true, chapters: []chapter{(*life).trial, (*life).addGoogle}},
	{chapters: []chapter{(*life).failRenewal, (*life).rename}},
	{chapters: []chapter{(*life).ban}},
	{chapters: []chapter{(*life).found, (*life).dissolve, (*life).signOut}},
	{chapters: []chapter{(*life).onboard, (*life).leave}},
	{chapters: []chapter{(*life).travel, (*life).oddMetadata}},
	{chapters: []chapter{(*life).burst}},
	{google: true, chapters: []chapter{(*life).cancelForGood, (*life).signOut}},
	{phone: true, chapters: []chapter{(*life).addEmail, (*life).leave}},
	{chapters: []chapter{(*life).onboard, (*life).upgrade, (*life).found, (*life).leave}},
	{waitlist: true, pending: true, chapters: []chapter{(*life).oddMetadata}},
	{},
	{},
	{},
	{},
}

// often is what people do, the more often the more common.
var often = []chapter{
	(*life).onboard, (*life).onboard, (*life).onboard, (*life).rename, (*life).oddMetadata, (*life).addEmail,
	(*life).addPhone, (*life).addGoogle, (*life).signOut, (*life).signOut, (*life).signIn, (*life).signIn,
	(*life).removeSession, (*life).found, (*life).upgrade,
}

var seldom = []chapter{
	(*life).ban, (*life).lock, (*life).leave, (*life).leave, (*life).leave, (*life).dissolve, (*life).trial,
	(*life).failRenewal, (*life).cancelOnce, (*life).cancelForGood, (*life).travel, (*life).burst,
}

// openInstance makes the roles and permissions that exist before anyone signs up, and changes them later.
func (c *Clerk) openInstance() {
	grant := func(key, name string) *permission {
		at := c.tick()
		p := &permission{
			CreatedAt: at, UpdatedAt: at, ID: c.id("perm"), Object: "permission", Type: "user",
			Key: "org:" + key, Name: name, Description: "Ability to " + strings.ToLower(name) + " in the organization",
		}
		c.emit("permission.created", p.ID, nil, at, c.render(p))
		return p
	}
	appoint := func(key, name string, permissions ...*permission) *role {
		at := c.tick()
		r := &role{
			CreatedAt: at, UpdatedAt: at, ID: c.id("role"), Object: "role", Key: "org:" + key, Name: name,
			Description: name + " of the organization",
		}
		for _, p := range permissions {
			r.Permissions = append(r.Permissions, *p)
		}
		c.emit("role.created", r.ID, nil, at, c.render(r))
		return r
	}
	c.after(0, func() {
		create, publish, archive := grant("posts:create", "Create posts"), grant("posts:publish", "Publish posts"), grant("posts:archive", "Archive posts")
		manager, temp := appoint("content_manager", "Content manager", create, publish), appoint("temp", "Temporary help", archive)
		c.after(20*minute, func() {
			create.Description, create.UpdatedAt = "Create and schedule posts", c.tick()
			c.emit("permission.updated", create.ID, nil, create.UpdatedAt, c.render(create))
			manager.Permissions = []permission{*create, *publish, *archive}
			manager.UpdatedAt = c.tick()
			c.emit("role.updated", manager.ID, nil, manager.UpdatedAt, c.render(manager))
		})
		c.after(3*hour, func() {
			c.emitDeleted("role.deleted", "role", temp.ID, nil, nil, "")
			manager.Permissions = manager.Permissions[:2]
			manager.UpdatedAt = c.tick()
			c.emit("role.updated", manager.ID, nil, manager.UpdatedAt, c.render(manager))
			c.emitDeleted("permission.deleted", "permission", archive.ID, nil, nil, "")
		})
	})
}

// begin lets the life of the person with this number begin.
func (c *Clerk) begin(number int) {
	n := c.rng.IntN(len(latin))
	by := clients[c.rng.IntN(len(clients))]
	by.ip += strconv.Itoa(1 + c.rng.IntN(254))
	l := &life{c: c, client: by, name: fmt.Sprintf("%s.%d", latin[n], number+1), host: hosts[c.rng.IntN(len(hosts))]}
	var s script
	if number < len(cast) {
		s = cast[number]
	} else {
		s.waitlist, s.phone, s.google, s.pending = c.chance(.05), c.chance(.08), c.chance(.3), c.chance(.03)
		for range c.rng.IntN(4) {
			s.chapters = append(s.chapters, often[c.rng.IntN(len(often))])
		}
		if c.chance(.15) {
			s.chapters = append(s.chapters, seldom[c.rng.IntN(len(seldom))])
		}
	}
	signUp := func() {
		l.signUp(n, s)
		at := time.Duration(0)
		for _, chapter := range s.chapters {
			at += c.about(6 * hour)
			c.after(at, func() {
				if !l.gone {
					chapter(l)
				}
			})
		}
	}
	if !s.waitlist {
		signUp()
		return
	}
	l.join()
	c.after(c.about(12*hour), func() { l.letIn(); c.after(c.about(2*hour), signUp) })
}

// later lets something happen unless the person has left by then.
func (l *life) later(d time.Duration, do func()) {
	l.c.after(l.c.about(d), func() {
		if !l.gone {
			do()
		}
	})
}

func (l *life) address() string { return l.name + "@" + l.host }

func (l *life) number() string { return fmt.Sprintf("+1555555%04d", 100+l.c.rng.IntN(100)) }

// --- waitlist ---

func (l *life) join() {
	c := l.c
	at := c.tick()
	l.entry = &waitlistEntry{CreatedAt: at, EmailAddress: l.address(), ID: c.id("wle"), Object: "waitlist_entry", Status: "pending"}
	l.saveEntry("waitlistEntry.created", at)
}

func (l *life) letIn() {
	c := l.c
	at := c.tick()
	l.entry.Invitation = &signUpInvitation{
		CreatedAt: at, UpdatedAt: at, EmailAddress: l.address(), ExpiresAt: at + (30 * day).Milliseconds(), ID: c.id("inv"),
		Object: "invitation", Status: "pending", URL: "https://accounts.example.com/sign-up?__clerk_ticket=example",
	}
	l.entry.Status = "invited"
	l.saveEntry("waitlistEntry.updated", at)
}

func (l *life) saveEntry(typ string, at int64) {
	l.entry.UpdatedAt = at
	l.c.emit(typ, l.entry.ID, l, at, l.c.render(l.entry))
}

// --- the account ---

func (l *life) sendEmailCode(idn, to string) {
	c := l.c
	code := fmt.Sprintf("%06d", c.rng.IntN(1_000_000))
	e := &email{
		Body: "<!DOCTYPE html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\"><title>" + code + " is your Acme verification code</title></head>\n" +
			"<body><p>Verification code: <b>" + code + "</b></p></body>\n</html>",
		BodyPlain: code + " is your verification code for Acme.\n\nDo not share this with anyone.",
		Data: []byte(`{"app":{"domain_name":"example.com","logo_image_url":"https://img.clerk.com/xxxxxx","logo_url":null,"name":"Acme","url":"https://accounts.example.com"},"otp_code":"` +
			code + `","requested_at":"` + time.UnixMilli(c.now).UTC().Format("2 January 2006, 15:04 MST") + `","requested_by":"` + l.client.browser + `","theme":{"button_text_color":"#ffffff","primary_color":"#335bf1","show_clerk_branding":true},"user":{"public_metadata":{},"public_metadata_fallback":""}}`),
		ByClerk: true, EmailAddressID: &idn, FromName: "notifications", ID: c.id("ema"), Object: "email", Slug: "verification_code",
		Status: "queued", Subject: code + " is your verification code", To: to,
	}
	if l.user != nil {
		e.UserID = &l.user.ID
	}
	c.emit("email.created", e.ID, l, 0, c.render(e))
}

func (l *life) sendSMSCode(idn, to string) {
	c := l.c
	m := &message{
		CreatedAt: c.tick(), ByClerk: true, From: "+15555550199", ID: c.id("sms"), Object: "sms_message", PhoneNumberID: &idn,
		Message: fmt.Sprintf("Your verification code is %06d", c.rng.IntN(1_000_000)), Slug: "verification_code", Status: "queued", To: to,
	}
	if l.user != nil {
		m.UserID = &l.user.ID
	}
	c.emit("sms.created", m.ID, l, 0, c.render(m))
}

func (l *life) newEmail(address, id string, v *verification) emailAddress {
	at := l.c.now
	return emailAddress{CreatedAt: at, UpdatedAt: at, EmailAddress: address, ID: id, LinkedTo: []link{}, Object: "email_address", Verification: v}
}

func (l *life) newPhone(number, id string) phoneNumber {
	at := l.c.now
	return phoneNumber{
		CreatedAt: at, UpdatedAt: at, ID: id, LinkedTo: []link{}, Object: "phone_number", PhoneNumber: number,
		Verification: &verification{Attempts: ptr(1), Channel: "sms", ExpireAt: ptr(at + 600_000), Object: "verification_otp", Status: "verified", Strategy: "phone_code"},
	}
}

func (l *life) newGoogle(address, first, last string) externalAccount {
	c := l.c
	at := c.now
	return externalAccount{
		ApprovedScopes: "email https://www.googleapis.com/auth/userinfo.email https://www.googleapis.com/auth/userinfo.profile openid profile",
		AvatarURL:      "https://lh3.googleusercontent.com/a/example", ImageURL: "https://img.clerk.com/example",
		CreatedAt: at, UpdatedAt: at, EmailAddress: address, FirstName: first, LastName: last, ID: c.id("eac"), IdentificationID: c.id("idn"),
		Object: "external_account", Provider: "oauth_google", ProviderUserID: fmt.Sprintf("1%020d", c.rng.Int64N(1e18)),
		Verification: &verification{ExpireAt: ptr(at + 600_000), Object: "verification_oauth", Status: "verified", Strategy: "oauth_google"},
	}
}

func (l *life) signUp(n int, s script) {
	c := l.c
	first, last := firstNames[n], lastNames[c.rng.IntN(len(lastNames))]
	idn := c.id("idn")
	number := ""
	switch {
	case s.phone:
		number = l.number()
		l.sendSMSCode(idn, number)
	case !s.google:
		l.sendEmailCode(idn, l.address())
	}
	c.now += 15_000 + c.rng.Int64N(20_000) // typing the code
	at := c.tick()
	u := &user{
		CreateOrganization: true, CreatedAt: at, DeleteSelf: true, EmailAddresses: []emailAddress{}, ExternalAccounts: []externalAccount{},
		FirstName: &first, LastName: &last, ID: c.id("user"), LastActiveAt: ptr(at - 1), Object: "user", PhoneNumbers: []phoneNumber{},
		ProfileImageURL: gravatar, VerificationAttempts: ptr(100), UnsafeMetadata: `{"signup_source":"landing-page","newsletter":true}`,
	}
	u.ImageURL = c.avatar(u.ID)
	switch {
	case s.phone:
		u.PhoneNumbers = []phoneNumber{l.newPhone(number, idn)}
		u.PrimaryPhone = &idn
	case s.google:
		account := l.newGoogle(l.address(), first, last)
		address := l.newEmail(l.address(), idn, &verification{Object: "verification_from_oauth", Status: "verified", Strategy: "from_oauth_google"})
		address.LinkedTo = []link{{ID: account.IdentificationID, Type: "oauth_google"}}
		u.EmailAddresses, u.ExternalAccounts, u.PrimaryEmail, u.HasImage = []emailAddress{address}, []externalAccount{account}, &idn, true
		u.ImageURL = account.ImageURL
	default:
		u.EmailAddresses = []emailAddress{l.newEmail(l.address(), idn, &verification{
			Attempts: ptr(1), ExpireAt: ptr(at + 600_000), Object: "verification_otp", Status: "verified", Strategy: "email_code",
		})}
		u.PrimaryEmail, u.PasswordEnabled, u.PasswordUpdatedAt = &idn, true, &at
	}
	if c.chance(.1) {
		u.ExternalID = ptr(fmt.Sprintf("crm-%d", 20000+c.rng.IntN(70000)))
	}
	if c.chance(.1) {
		u.UnsafeMetadata = oddities[c.rng.IntN(len(oddities))]
	}
	if c.cfg.NULs && c.chance(.2) {
		u.UnsafeMetadata = `{"bio":"nul\u0000inside"}`
	}
	l.user = u
	l.saveUser("user.created")
	if l.entry != nil {
		l.entry.Status, l.entry.Invitation.Status, l.entry.Invitation.UpdatedAt = "completed", "accepted", c.tick()
		l.saveEntry("waitlistEntry.updated", c.tick())
	}
	if s.pending {
		l.signInPending()
	} else {
		l.signIn()
	}
	l.subscribe()
	if len(c.recent) < 64 {
		c.recent = append(c.recent, l)
	} else {
		c.recent[c.rng.IntN(len(c.recent))] = l
	}
}

func (l *life) saveUser(typ string) {
	u := l.user
	u.UpdatedAt = l.c.tick()
	u.json = l.c.render(u)
	l.c.emit(typ, u.ID, l, u.UpdatedAt, u.json)
}

func (l *life) updateUser() { l.saveUser("user.updated") }

func (l *life) onboard() {
	l.user.PublicMetadata = `{"onboardingComplete":true,"plan":"free"}`
	l.user.PrivateMetadata = metadata(`{"stripe_customer_id":"cus_` + l.user.ID[len(l.user.ID)-10:] + `"}`)
	l.updateUser()
}

func (l *life) rename() {
	last := lastNames[l.c.rng.IntN(len(lastNames))]
	l.user.LastName, l.user.Locale = &last, ptr("en-GB")
	l.user.Username = ptr(strings.ReplaceAll(l.name, ".", "_"))
	l.updateUser()
}

func (l *life) oddMetadata() {
	l.user.UnsafeMetadata = oddities[l.c.rng.IntN(len(oddities))]
	l.user.PublicMetadata = oddities[l.c.rng.IntN(len(oddities))]
	l.updateUser()
}

// addEmail adds a second address, verifies it, and makes it the primary one, which is then not the first.
func (l *life) addEmail() {
	c := l.c
	c.tick()
	id, address := c.id("idn"), l.name+"+work@"+hosts[c.rng.IntN(len(hosts))]
	u := l.user
	u.EmailAddresses = append(slices.Clone(u.EmailAddresses), l.newEmail(address, id, &verification{
		Attempts: ptr(0), ExpireAt: ptr(c.now + 600_000), Object: "verification_otp", Status: "unverified", Strategy: "email_code",
	}))
	l.updateUser()
	l.sendEmailCode(id, address)
	l.later(2*minute, func() {
		for i := range u.EmailAddresses {
			if a := &u.EmailAddresses[i]; a.ID == id {
				a.Verification = &verification{Attempts: ptr(1), ExpireAt: a.Verification.ExpireAt, Object: "verification_otp", Status: "verified", Strategy: "email_code"}
				a.UpdatedAt = c.tick()
			}
		}
		u.PrimaryEmail = &id
		l.updateUser()
	})
}

func (l *life) addPhone() {
	c := l.c
	c.tick()
	id, number := c.id("idn"), l.number()
	l.sendSMSCode(id, number)
	l.later(minute, func() {
		l.user.PhoneNumbers = append(slices.Clone(l.user.PhoneNumbers), l.newPhone(number, id))
		if l.user.PrimaryPhone == nil {
			l.user.PrimaryPhone = &id
		}
		l.updateUser()
	})
}

func (l *life) addGoogle() {
	l.c.tick()
	account := l.newGoogle(l.address(), *l.user.FirstName, *l.user.LastName)
	l.user.ExternalAccounts = append(slices.Clone(l.user.ExternalAccounts), account)
	l.updateUser()
}

func (l *life) lock() {
	l.user.Locked, l.user.LockoutExpires, l.user.VerificationAttempts = true, ptr(int64(3600)), ptr(0)
	l.updateUser()
	l.later(hour, func() {
		l.user.Locked, l.user.LockoutExpires, l.user.VerificationAttempts = false, nil, ptr(100)
		l.updateUser()
	})
}

// ban bans the person, which revokes every session, and sometimes relents.
func (l *life) ban() {
	l.user.Banned = true
	l.updateUser()
	l.endAll("revoked")
	if l.c.chance(.5) {
		l.later(day, func() { l.user.Banned = false; l.updateUser(); l.signIn() })
	}
}

// leave deletes the account: sessions, memberships and what only this person had go first.
func (l *life) leave() {
	c := l.c
	l.endAll("removed")
	for _, m := range slices.Clone(l.memberships) {
		if len(m.org.members) == 1 {
			c.deleteOrganization(m.org, l)
		} else {
			c.endMembership(m, l)
		}
	}
	l.unsubscribe()
	c.emitDeleted("user.deleted", "user", l.user.ID, l, l.user.ExternalID, "")
	l.gone = true
	if i := slices.Index(c.recent, l); i >= 0 {
		c.recent = slices.Delete(c.recent, i, i+1)
	}
}

// --- sessions ---

func (l *life) newSession(status string) *session {
	c := l.c
	at := c.tick()
	s := &session{
		AbandonAt: at + (30 * day).Milliseconds(), ClientID: c.id("client"), CreatedAt: at, ExpireAt: at + (7 * day).Milliseconds(),
		ID: c.id("sess"), Object: "session", Status: status, UserID: l.user.ID,
	}
	l.open = append(l.open, s)
	return s
}

func (l *life) saveSession(s *session, typ string) {
	s.UpdatedAt = l.c.tick()
	s.LastActiveAt = s.UpdatedAt
	s.User = l.user.json
	l.c.emit(typ, s.ID, l, s.UpdatedAt, l.c.render(s))
	s.User = nil // the next event carries the user of then
}

// activate announces a session that is active now, after the user whose last sign-in it is.
func (l *life) activate(s *session) {
	c := l.c
	l.user.LastSignInAt, l.user.LastActiveAt = ptr(c.now), ptr(c.now)
	l.updateUser()
	s.Status = "active"
	s.LatestActivity = &sessionActivity{
		BrowserName: l.client.browser, BrowserVersion: l.client.version, City: l.client.city, Country: l.client.country,
		DeviceType: l.client.device, ID: c.id("sess_activity"), IPAddress: l.client.ip, IsMobile: l.client.mobile, Object: "session_activity",
	}
	if len(l.memberships) > 0 {
		s.LastActiveOrg = &l.memberships[0].org.ID
	}
	l.saveSession(s, "session.created")
}

func (l *life) signIn() {
	if l.user.Banned || l.user.Locked {
		return
	}
	l.activate(l.newSession("active"))
}

// signInPending signs in with a task that is still open. Which event Clerk sends when it is done is
// not known; here it is session.created.
func (l *life) signInPending() {
	s := l.newSession("pending")
	l.saveSession(s, "session.pending")
	l.later(2*minute, func() {
		if slices.Contains(l.open, s) && !l.user.Banned && !l.user.Locked {
			l.activate(s)
		}
	})
}

func (l *life) end(s *session, status string) {
	l.open = slices.DeleteFunc(slices.Clone(l.open), func(o *session) bool { return o == s })
	s.Status, s.LatestActivity = status, nil
	l.saveSession(s, "session."+status)
}

func (l *life) endAll(status string) {
	for _, s := range slices.Clone(l.open) {
		l.end(s, status)
	}
}

func (l *life) signOut() {
	if len(l.open) > 0 {
		l.end(l.open[0], "ended")
	}
}

func (l *life) removeSession() {
	if len(l.open) > 0 {
		l.end(l.open[len(l.open)-1], "removed")
	}
}

// travel signs in from one country after the other within hours.
func (l *life) travel() {
	home := l.client
	for i := range clients {
		l.later(time.Duration(i+1)*hour, func() {
			l.client = clients[i]
			l.client.ip += "77"
			l.signIn()
			l.client = home
		})
	}
}

// burst opens many sessions within minutes.
func (l *life) burst() {
	for i := range 7 {
		l.later(time.Duration(i+1)*minute/2, l.signIn)
	}
}
