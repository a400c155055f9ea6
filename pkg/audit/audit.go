// Package audit remembers who changed what on purpose: one row of audit_log for every replay and every discard.
//
// The row is there before the first change is made, so a run that was killed has left a trace; it says what was done by
// the time of its last note, which is to be taken after every page. The package refuses nothing and decides nothing: a caller that cannot write its row must not begin.
package audit

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/segmentio/ksuid"
	"gorm.io/gorm"
)

// Action is what was done. The set is closed.
type Action string

// The actions.
const (
	ReplayLetters  Action = "dead_letters.replay"
	DiscardLetters Action = "dead_letters.discard"
	ReplayEvents   Action = "events.replay"
)

// unfinished is the detail of a row whose run has not come to its end.
const unfinished = "has not come to its end: running, or killed"

// Log is the row of one run. It is for one goroutine.
type Log struct {
	db *gorm.DB
	id string

	affected int       // by the last note
	noted    time.Time // when that was
}

// Begin writes the row of a run that is about to change something. selector is what was asked for, as flags say it.
func Begin(ctx context.Context, db *gorm.DB, actor string, action Action, selector string) (*Log, error) {
	now := time.Now().UTC()
	id, err := newID(now)
	if err != nil {
		return nil, fmt.Errorf("write audit log: %w", err)
	}
	const insert = "INSERT INTO audit_log (id, at, actor, action, selector, affected, failed, detail) VALUES (?, ?, ?, ?, ?, 0, 0, ?)"
	if err := db.WithContext(ctx).Exec(insert, id, now, actor, string(action), selector, unfinished).Error; err != nil {
		return nil, fmt.Errorf("write audit log: %w", err)
	}
	return &Log{db: db, id: id, noted: now}, nil
}

// newID sorts by time: a KSUID, which knows the second only, with the nanoseconds in front of what is random.
func newID(at time.Time) (string, error) {
	var payload [16]byte
	binary.BigEndian.PutUint32(payload[:], uint32(at.Nanosecond()))
	_, _ = rand.Read(payload[4:]) // never fails
	id, err := ksuid.FromParts(at, payload[:])
	if err != nil {
		return "", fmt.Errorf("make id: %w", err)
	}
	return id.String(), nil
}

// noteEvery is how often a note is written where no more is affected, noteTimeout how long a run is held up by one.
const (
	noteEvery   = time.Second
	noteTimeout = time.Second
)

// Note says how far the run has come. It is to be called at every step: it writes where more is affected than it knew, and else once
// a second. A note that fails is no reason to stop; the next one says it all.
func (l *Log) Note(ctx context.Context, affected, failed int) error {
	if affected == l.affected && time.Since(l.noted) < noteEvery {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, noteTimeout)
	defer cancel()
	if err := l.update(ctx, affected, failed, unfinished); err != nil {
		return err
	}
	l.affected, l.noted = affected, time.Now()
	return nil
}

// End says how the run ended: detail is why before its end, empty where it came to it.
func (l *Log) End(ctx context.Context, affected, failed int, detail string) error {
	return l.update(ctx, affected, failed, detail)
}

func (l *Log) update(ctx context.Context, affected, failed int, detail string) error {
	result := l.db.WithContext(ctx).Exec("UPDATE audit_log SET affected = ?, failed = ?, detail = ? WHERE id = ?", affected, failed, detail, l.id)
	if result.Error != nil {
		return fmt.Errorf("write audit log: %w", result.Error)
	}
	if result.RowsAffected == 0 {
		return errors.New("write audit log: its row is gone")
	}
	return nil
}
