package mirror

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/tidwall/gjson"
	"gorm.io/gorm"
)

// Who is deleted is not named any more. The tombstone of a user keeps its id alone. What other objects say of the user (a name, an address,
// where a session was) is taken out of raw, and so of the columns that follow from it: of objects that were made before the user's newest
// delete or within forgetFor of it, whether that delete won or not. last_deleted_at of a user is that newest delete. So which rows are nameless
// does not depend on the order of arrival, also where a user who was deleted by mistake returns.

// forgetFor is how long after a delete objects are made that are still of the deleted user: a payment that was under way, say.
const forgetFor = 30 * 24 * time.Hour

// person is a column of a table that names a user, and what is kept of those members of raw that name the user otherwise. A member of which
// nothing is kept is left out.
type person struct {
	in   string
	keep map[string][]string
}

// keptOfUser are the members of a deleted user's own object.
var keptOfUser = []string{"id", "object", "deleted"}

var (
	keptOfPayer = map[string][]string{"payer": {"id", "object", "user_id", "organization_id", "created_at", "updated_at"}}
	persons     = map[string][]person{
		"organization_memberships": {{"user_id", map[string][]string{"public_user_data": {"user_id"}}}},
		"organization_invitations": {
			{"user_id", map[string][]string{"email_address": nil, "url": nil}},
			{"inviter_id", map[string][]string{"public_inviter_data": {"user_id"}}},
		},
		"sessions": {{"user_id", map[string][]string{
			"user": {"id"}, "latest_activity": {"id", "object", "country", "device_type", "is_mobile", "browser_name", "browser_version"},
		}}},
		"subscriptions":      {{"payer_user_id", keptOfPayer}},
		"subscription_items": {{"payer_user_id", keptOfPayer}},
		"payment_attempts":   {{"payer_user_id", keptOfPayer}},
	}
)

// forget is raw without what names the person.
func (p *person) forget(raw string) string {
	return filter(raw, func(name, value gjson.Result) (string, bool) {
		kept, named := p.keep[name.Str]
		switch {
		case !named || value.Type == gjson.Null:
			return value.Raw, true
		case kept == nil || !value.IsObject():
			return "", false
		}
		return only(value.Raw, kept), true
	})
}

// only is an object with no other members than those named.
func only(object string, names []string) string {
	return filter(object, func(name, value gjson.Result) (string, bool) { return value.Raw, slices.Contains(names, name.Str) })
}

// filter is an object with the members that keep returns, itself where none changes.
func filter(object string, keep func(name, value gjson.Result) (string, bool)) string {
	var out strings.Builder
	changed := false
	gjson.Parse(object).ForEach(func(name, value gjson.Result) bool {
		text, kept := keep(name, value)
		changed = changed || !kept || text != value.Raw
		if kept {
			if out.Len() > 0 {
				out.WriteByte(',')
			}
			out.WriteString(name.Raw + ":" + text)
		}
		return true
	})
	if !changed {
		return object
	}
	return "{" + out.String() + "}"
}

// Nameless are the forms in which the mirror keeps a living object of a table (a name of [Tables]) once users whom it names are deleted: without one of
// them, or without several. None where the object names nobody.
func Nameless(table, raw string) []string {
	forms := []string{raw}
	for _, p := range persons[table] {
		for _, form := range forms {
			if without := p.forget(form); without != form {
				forms = append(forms, without)
			}
		}
	}
	return forms[1:]
}

// forgotten is a user of whom a delete was seen.
type forgotten struct {
	source string
	last   time.Time // delete
}

// names reports whether an object of the user that was made then still names the user.
func (f *forgotten) names(made *time.Time) bool {
	return made != nil && made.After(f.last.Add(forgetFor))
}

// noteDeletes notes the deletes of users of the batch, be they older than the row or not, and returns the users of whom they are news.
func (s states) noteDeletes(ctx context.Context, tx *gorm.DB) (ids []string, err error) {
	for _, r := range s.sorted(usersTable) {
		if r.lastDeleted == 0 {
			continue
		}
		at := timeOf(r.lastDeleted).box(Time)
		result := tx.WithContext(ctx).Exec("UPDATE users SET last_deleted_at = ? WHERE id = ? AND source = ? AND (last_deleted_at IS NULL OR last_deleted_at < ?)", at, r.id, r.source, at)
		if result.Error != nil {
			return nil, fmt.Errorf("note the delete of a user: %w", result.Error)
		}
		if result.RowsAffected > 0 {
			ids = append(ids, r.id)
		}
	}
	return ids, nil
}

// forgottenUsers are those of the ids of whom a delete was seen.
func forgottenUsers(ctx context.Context, tx *gorm.DB, ids []string) (map[string]*forgotten, error) {
	found := map[string]*forgotten{}
	if len(ids) == 0 {
		return found, nil
	}
	rows, err := query(ctx, tx, "SELECT id, source, last_deleted_at FROM users WHERE last_deleted_at IS NOT NULL AND id", ids)
	if err != nil {
		return nil, fmt.Errorf("read users: %w", err)
	}
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		var id string
		f := &forgotten{}
		if err := rows.Scan(&id, &f.source, &f.last); err != nil {
			return nil, fmt.Errorf("read users: %w", err)
		}
		found[id] = f
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read users: %w", err)
	}
	return found, nil
}

// forgetNew takes the names of those who are deleted out of the rows of the batch.
func (s states) forgetNew(users map[string]*forgotten) {
	if len(users) == 0 {
		return
	}
	var memory scratch
	for table, rows := range s {
		for _, r := range rows {
			rawAt := table.deletedAt() + 1
			was, _ := r.values[rawAt].(string)
			raw := was
			for _, p := range table.persons {
				id, _ := r.values[2+table.index(p.in)].(string)
				made, _ := r.values[2+len(table.Columns)].(time.Time)
				if f := users[id]; f != nil && f.source == r.source && !f.names(nullTime(made)) {
					raw = p.forget(raw)
				}
			}
			if raw == was {
				continue
			}
			r.values[rawAt] = raw
			for i, v := range table.derive(&memory, raw) {
				if i != table.ended { // a delete ends a session too
					r.values[2+i] = v.box(table.typed[i].Kind)
				}
			}
		}
	}
}

func nullTime(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// forgetOld takes the names of users out of rows that are there.
func forgetOld(ctx context.Context, tx *gorm.DB, users map[string]*forgotten, now time.Time) error {
	if len(users) == 0 {
		return nil
	}
	ids := slices.Sorted(maps.Keys(users))
	for _, table := range tables {
		for _, p := range table.persons {
			if err := table.forgetOld(ctx, tx, &p, users, ids, now); err != nil {
				return fmt.Errorf("forget users in %s: %w", table.Name, err)
			}
		}
	}
	return nil
}

func (t *Table) forgetOld(ctx context.Context, tx *gorm.DB, p *person, users map[string]*forgotten, ids []string, now time.Time) error {
	var rows []struct {
		ID, Source, Person, Raw string
		Made                    *time.Time
	}
	statement := "SELECT id, source, " + p.in + " AS person, raw, clerk_created_at AS made FROM " + t.Name + " WHERE " + p.in + " IN ? ORDER BY id"
	if err := tx.WithContext(ctx).Raw(statement, ids).Scan(&rows).Error; err != nil {
		return err
	}
	var memory scratch
	for _, r := range rows {
		f := users[r.Person]
		raw := p.forget(r.Raw)
		if f.source != r.Source || f.names(r.Made) || raw == r.Raw {
			continue
		}
		set, args := []string{"raw = ?", "synced_at = ?"}, []any{raw, now}
		was := slices.Clone(t.derive(&memory, r.Raw))
		for i, is := range t.derive(&memory, raw) {
			if is != was[i] && i != t.ended {
				set, args = append(set, t.typed[i].Name+" = ?"), append(args, is.box(t.typed[i].Kind))
			}
		}
		if err := tx.WithContext(ctx).Exec("UPDATE "+t.Name+" SET "+strings.Join(set, ", ")+" WHERE id = ?", append(args, r.ID)...).Error; err != nil {
			return err
		}
	}
	return nil
}
