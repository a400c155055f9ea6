package emulator

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"iter"
	"strconv"
	"time"

	"github.com/segmentio/ksuid"
)

// Crowd is any number of users who are made when they are looked at: a million take no memory. They never
// change; each one is 1.6 KB of JSON. Its methods are safe for concurrent use.
type Crowd struct {
	size  int
	start int64 // ms, of the first sign-up
	step  int64 // ms between two
	parts [][]byte
}

// Where the parts of the template are joined.
const (
	markID = "\x01"
	markNo = "\x02" // the number
	markAt = "1111111111111"
	markUp = "2222222222222"
)

// NewCrowd makes size users who signed up one after the other from DefaultStart on, 40 s apart, or closer together
// where that would reach into the last month.
func NewCrowd(size int) *Crowd {
	c := &Crowd{size: size, start: DefaultStart.Add(-400 * 24 * time.Hour).UnixMilli(), step: 40_000}
	if size > 0 {
		c.step = max(2, min(c.step, (370*24*time.Hour).Milliseconds()/int64(size)))
	}
	const at, up = int64(1111111111111), int64(2222222222222)
	first, last, idn := "Ada", "Lovelace "+markNo, "idn_"+markID
	u := &user{
		CreateOrganization: true, CreatedAt: at, DeleteSelf: true, ExternalAccounts: []externalAccount{}, FirstName: &first, LastName: &last, ID: "user_" + markID,
		LastActiveAt: ptr(up), LastSignInAt: ptr(up), Object: "user", PhoneNumbers: []phoneNumber{}, ProfileImageURL: gravatar, VerificationAttempts: ptr(100),
		ImageURL:       "https://img.clerk.com/eyJ0eXBlIjoiZGVmYXVsdCIsImlpZCI6Imluc18zNEJtQjk0dUlsdDA0N0FCelJlZTJkcVpKS1kifQ",
		UnsafeMetadata: `{"signup_source":"landing-page","newsletter":true}`, PublicMetadata: `{"onboardingComplete":true,"plan":"free"}`, PasswordEnabled: true, PasswordUpdatedAt: ptr(at),
		EmailAddresses: []emailAddress{{
			CreatedAt: at, UpdatedAt: at, EmailAddress: "person." + markNo + "@example.com", ID: idn, LinkedTo: []link{}, Object: "email_address",
			Verification: &verification{Attempts: ptr(1), ExpireAt: ptr(at), Object: "verification_otp", Status: "verified", Strategy: "email_code"},
		}},
		PrimaryEmail: &idn, UpdatedAt: up,
	}
	template := (&Clerk{}).render(u)
	template = bytes.ReplaceAll(template, []byte("\\u0001"), []byte(markID))
	template = bytes.ReplaceAll(template, []byte("\\u0002"), []byte(markNo))
	for len(template) > 0 {
		at, mark := len(template), ""
		for _, m := range []string{markID, markNo, markAt, markUp} {
			if i := bytes.Index(template, []byte(m)); i >= 0 && i < at {
				at, mark = i, m
			}
		}
		c.parts = append(c.parts, template[:at], []byte(mark))
		template = template[at+len(mark):]
	}
	return c
}

// Size is how many users there are.
func (c *Crowd) Size() int { return c.size }

// CreatedAt is when a user signed up, in ms; the order of the numbers is that of the sign-ups. A user's updated_at is a second later.
func (c *Crowd) CreatedAt(number int) int64 { return c.start + int64(number)*c.step }

// ID is the id of the user with a number from 0 to Size-1.
func (c *Crowd) ID(number int) string { return "user_" + c.key(number) }

func (c *Crowd) key(number int) string {
	var payload [16]byte
	binary.BigEndian.PutUint64(payload[:], 0x75736865725f3432) // so that strangers' ids are told apart
	binary.BigEndian.PutUint64(payload[8:], uint64(number))
	k, err := ksuid.FromParts(time.UnixMilli(c.CreatedAt(number)), payload[:])
	if err != nil {
		panic(err) // the payload has the right length
	}
	return k.String()
}

// Number is that of the user with this id, false where there is none.
func (c *Crowd) Number(id string) (int, bool) {
	if len(id) < 6 {
		return 0, false
	}
	k, err := ksuid.Parse(id[len("user_"):])
	if err != nil {
		return 0, false
	}
	number := binary.BigEndian.Uint64(k.Payload()[8:])
	if number >= uint64(c.size) || c.ID(int(number)) != id {
		return 0, false
	}
	return int(number), true
}

// Append appends the JSON of the user with this number.
func (c *Crowd) Append(to []byte, number int) []byte {
	key := ""
	for i := 0; i < len(c.parts); i += 2 {
		to = append(to, c.parts[i]...)
		switch string(c.parts[i+1]) {
		case markID:
			if key == "" {
				key = c.key(number)
			}
			to = append(to, key...)
		case markNo:
			to = strconv.AppendInt(to, int64(number), 10)
		case markAt:
			to = strconv.AppendInt(to, c.CreatedAt(number), 10)
		case markUp:
			to = strconv.AppendInt(to, c.CreatedAt(number)+1000, 10)
		}
	}
	return to
}

// Object is the user with this number.
func (c *Crowd) Object(number int) Object {
	at := c.CreatedAt(number)
	return Object{ID: c.ID(number), CreatedAt: at, UpdatedAt: at + 1000, JSON: c.Append(nil, number)}
}

// All ranges over everybody in the order of their sign-ups.
func (c *Crowd) All() iter.Seq[Object] {
	return func(yield func(Object) bool) {
		for number := range c.size {
			if !yield(c.Object(number)) {
				return
			}
		}
	}
}

func (c *Crowd) String() string { return fmt.Sprintf("crowd of %d", c.size) }
