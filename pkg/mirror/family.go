package mirror

import (
	"context"
	"database/sql"
	"fmt"
	"hash/fnv"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
)

// A child lives no longer than its parents, in any order of arrival: who writes a child looks for the tombstones of its parents, and who
// changes whether a parent lives, or since when it does not, changes its children. Whether a child lives is a function of the
// rows that win, its own and its parents', so all orders end in the same. children_deleted_at of a parent is what its children know of its
// deleted_at.

// PostgreSQL's advisory locks between those who write children (shared) and those who change whether a parent lives. Whoever
// changes one holds familyLock: two of them may have a child in common. Whoever writes children of a few parents shares fewLock and the lock of
// each, so that a parent with very many children holds up only its own; else familyLock. Everybody takes them behind the rows of parents and before
// those of children, in this order, those of single parents in that of their keys: nobody waits in a circle. SQLite has one writer.
const (
	familyLock = 0x7573686572
	fewLock    = familyLock + 1
)

// fewParents bounds the locks of one transaction: the server has room for some thousands at once.
const fewParents = 64

// settleFamilies is called between the writes of parents and those of children. It brings the children of changed parents up to date and
// marks those of the batch whose parents are deleted.
func (s states) settleFamilies(ctx context.Context, tx *gorm.DB, now time.Time) error {
	changed := map[*Table][]string{}
	for _, parent := range tables[:parentTables] {
		if len(s[parent]) == 0 {
			continue
		}
		ids, err := changedParents(ctx, tx, parent, slices.Sorted(maps.Keys(s[parent])))
		if err != nil {
			return err
		}
		if len(ids) > 0 {
			changed[parent] = ids
		}
	}
	deleted, err := s.noteDeletes(ctx, tx)
	if err != nil {
		return err
	}
	wanted, children, known := s.parentsOfChildren()
	if len(changed) == 0 && len(deleted) == 0 && !children {
		return nil
	}
	if database.IsPostgres(tx) {
		exclusive := maps.Clone(changed)
		exclusive[usersTable] = append(slices.Clip(changed[usersTable]), deleted...)
		if err := lockFamilies(ctx, tx, exclusive, wanted, children && known); err != nil {
			return err
		}
	}
	for _, parent := range tables[:parentTables] {
		if err := settleChildren(ctx, tx, parent, changed[parent], now); err != nil {
			return err
		}
	}
	old, err := forgottenUsers(ctx, tx, deleted)
	if err != nil {
		return err
	}
	if err := forgetOld(ctx, tx, old, now); err != nil {
		return err
	}
	if err := s.mark(ctx, tx, wanted); err != nil {
		return err
	}
	named, err := forgottenUsers(ctx, tx, slices.Sorted(maps.Keys(wanted[usersTable])))
	if err != nil {
		return err
	}
	s.forgetNew(named)
	return nil
}

// lockFamilies takes the locks of a transaction that changes parents and writes children of those wanted; single: it wants no others.
func lockFamilies(ctx context.Context, tx *gorm.DB, changed map[*Table][]string, wanted map[*Table]map[string]bool, single bool) error {
	exclusive := map[int64]bool{}
	for _, ids := range changed {
		for _, id := range ids {
			exclusive[parentKey(id)] = true
		}
	}
	shared := map[int64]bool{}
	for _, ids := range wanted {
		for id := range ids {
			shared[parentKey(id)] = true
		}
	}
	var keys []int64
	var modes []bool // exclusive
	add := func(key int64, mode bool) { keys, modes = append(keys, key), append(modes, mode) }
	switch {
	case len(exclusive) > fewParents:
		add(familyLock, true)
		add(fewLock, true)
	case len(exclusive) > 0: // its children, whoever their parents are, are safe behind familyLock
		add(familyLock, true)
		for _, key := range slices.Sorted(maps.Keys(exclusive)) {
			add(key, true)
		}
	case single && len(shared) <= fewParents:
		add(fewLock, false)
		for _, key := range slices.Sorted(maps.Keys(shared)) {
			add(key, false)
		}
	default:
		add(familyLock, false)
	}
	for i, key := range keys {
		lock := "SELECT pg_advisory_xact_lock_shared($1)"
		if modes[i] {
			lock = "SELECT pg_advisory_xact_lock($1)"
		}
		if _, err := tx.Statement.ConnPool.ExecContext(ctx, lock, key); err != nil {
			return fmt.Errorf("lock families: %w", err)
		}
	}
	return nil
}

// parentKey is the key of a parent's lock; two parents may share one. It is negative, and so none of the others.
func parentKey(id string) int64 {
	sum := fnv.New64a()
	_, _ = sum.Write([]byte(id))
	return math.MinInt64 | int64(sum.Sum64())
}

// changedParents are those of the ids whose children know another deleted_at than the row has. SQLite has one writer, and each settles what it
// changes: there all such rows are the batch's, and an empty index is read faster than hundreds of ids are looked up in it.
func changedParents(ctx context.Context, tx *gorm.DB, parent *Table, ids []string) (changed []string, err error) {
	const unsettled = " WHERE deleted_at IS DISTINCT FROM children_deleted_at"
	var rows *sql.Rows
	if database.IsPostgres(tx) {
		rows, err = query(ctx, tx, "SELECT id FROM "+parent.Name+unsettled+" AND id", ids)
	} else {
		rows, err = tx.Statement.ConnPool.QueryContext(ctx, "SELECT id FROM "+parent.Name+" INDEXED BY "+parent.Name+"_unsettled"+unsettled+" ORDER BY id")
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", parent.Name, err)
	}
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		var id string
		if err := rows.Scan(&id); err != nil {
			return nil, fmt.Errorf("read %s: %w", parent.Name, err)
		}
		changed = append(changed, id)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read %s: %w", parent.Name, err)
	}
	return changed, nil
}

// settleChildren gives the children of parents the deleted_at that follows from all of their parents.
func settleChildren(ctx context.Context, tx *gorm.DB, parent *Table, ids []string, now time.Time) error {
	if len(ids) == 0 {
		return nil
	}
	for _, child := range tables[parentTables:] {
		for _, p := range child.parents {
			if p.table != parent {
				continue
			}
			at := "?"
			if database.IsPostgres(tx) {
				at = "$1"
			}
			statement, args := anyOf(tx, "UPDATE "+child.Name+" SET (deleted_at, deleted_with) = ("+child.tombstoneQuery()+"), synced_at = "+at+
				" WHERE (deleted_at IS NULL OR deleted_with IS NOT NULL) AND "+p.in, ids, now)
			if _, err := tx.Statement.ConnPool.ExecContext(ctx, statement, args...); err != nil {
				return fmt.Errorf("settle %s of %s: %w", child.Name, parent.Name, err)
			}
		}
	}
	statement, args := anyOf(tx, "UPDATE "+parent.Name+" SET children_deleted_at = deleted_at WHERE id", ids)
	if _, err := tx.Statement.ConnPool.ExecContext(ctx, statement, args...); err != nil {
		return fmt.Errorf("settle %s: %w", parent.Name, err)
	}
	return nil
}

// tombstoneQuery finds the deleted parent of a row, that of the first rank where there are several: its deleted_at and its id.
func (t *Table) tombstoneQuery() string {
	var ranks []string
	for rank, p := range t.parents {
		ranks = append(ranks, fmt.Sprintf("SELECT %d AS rank, p.deleted_at, p.id FROM %s AS p WHERE p.id = %s.%s AND p.source = %s.source AND p.deleted_at IS NOT NULL",
			rank, p.name, t.Name, p.in, t.Name))
	}
	return "SELECT gone.deleted_at, gone.id FROM (" + strings.Join(ranks, " UNION ALL ") + ") AS gone ORDER BY gone.rank LIMIT 1"
}

// parentsOfChildren are the ids of the parents of all children of the batch, and of the users whom its rows name. known: each child names all
// of its parents.
func (s states) parentsOfChildren() (wanted map[*Table]map[string]bool, children, known bool) {
	wanted, known = map[*Table]map[string]bool{}, true
	for _, child := range tables[parentTables:] {
		for _, r := range s[child] {
			for _, p := range child.parents {
				children = true
				id, ok := r.values[2+p.index].(string)
				if !ok {
					known = false
					continue
				}
				if wanted[p.table] == nil {
					wanted[p.table] = map[string]bool{}
				}
				wanted[p.table][id] = true
			}
			for _, p := range child.persons {
				id, ok := r.values[2+child.index(p.in)].(string)
				if !ok {
					continue
				}
				children = true
				if wanted[usersTable] == nil {
					wanted[usersTable] = map[string]bool{}
				}
				wanted[usersTable][id] = true
			}
		}
	}
	return wanted, children, known
}

// mark deletes the children of the batch whose parents are deleted.
func (s states) mark(ctx context.Context, tx *gorm.DB, wanted map[*Table]map[string]bool) error {
	gone := map[*Table]map[string]tombstone{}
	for parent, ids := range wanted {
		var err error
		if gone[parent], err = tombstones(ctx, tx, parent, slices.Sorted(maps.Keys(ids))); err != nil {
			return err
		}
	}
	for _, child := range tables[parentTables:] {
		for _, r := range s[child] {
			for _, p := range child.parents {
				id, _ := r.values[2+p.index].(string)
				stone, dead := gone[p.table][id]
				if dead && stone.source == r.values[sourceAt] && r.values[child.deletedAt()] == nil {
					r.values[child.deletedAt()], r.values[child.deletedWith()] = stone.at.UTC(), id
				}
			}
		}
	}
	return nil
}

// tombstone is a parent that is deleted.
type tombstone struct {
	source string
	at     time.Time
}

func tombstones(ctx context.Context, tx *gorm.DB, parent *Table, ids []string) (map[string]tombstone, error) {
	rows, err := query(ctx, tx, "SELECT id, source, deleted_at FROM "+parent.Name+" WHERE deleted_at IS NOT NULL AND id", ids)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", parent.Name, err)
	}
	defer func() { _ = rows.Close() }()
	found := map[string]tombstone{}
	for rows.Next() {
		var id string
		var stone tombstone
		if err := rows.Scan(&id, &stone.source, &stone.at); err != nil {
			return nil, fmt.Errorf("read %s: %w", parent.Name, err)
		}
		found[id] = stone
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read %s: %w", parent.Name, err)
	}
	return found, nil
}

// query reads rows by a list of ids, with which the statement ends.
func query(ctx context.Context, tx *gorm.DB, statement string, ids []string) (*sql.Rows, error) {
	statement, args := anyOf(tx, statement, ids)
	return tx.Statement.ConnPool.QueryContext(ctx, statement, args...) //nolint:wrapcheck // the caller says of what
}

// anyOf ends a statement, which has the arguments before, with a condition on a list of ids.
func anyOf(tx *gorm.DB, statement string, ids []string, before ...any) (string, []any) {
	if database.IsPostgres(tx) {
		return fmt.Sprintf("%s = ANY($%d::text[])", statement, len(before)+1), append(before, ids)
	}
	for _, id := range ids {
		before = append(before, id)
	}
	return statement + " IN (?" + strings.Repeat(",?", len(ids)-1) + ")", before
}
