package deadletter_test

import (
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/deadletter"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/stream"
)

// TestSweepGetsUsedToWhatNobodyCanMend: a letter that is not Usher's and a row whose letter has gone stay for ever, and must not
// make every worker read all letters every minute.
func TestSweepGetsUsedToWhatNobodyCanMend(t *testing.T) {
	t.Parallel()
	for name, odd := range map[string]func(t *testing.T, b *sweepBundle){
		"a letter of somebody else": func(t *testing.T, b *sweepBundle) {
			_, err := b.js.PublishMsg(t.Context(), &nats.Msg{Subject: "clerk.dlq.theirs", Data: []byte("hello")})
			require.NoError(t, err)
		},
		"a row without its letter": func(t *testing.T, b *sweepBundle) {
			b.letter(t, "gone", true)
			b.letter(t, "last", true) // so that the row's number lies among the letters'
			s, err := b.js.Stream(t.Context(), stream.DeadLetters)
			require.NoError(t, err)
			require.NoError(t, s.DeleteMsg(t.Context(), s.CachedInfo().State.LastSeq-1))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, js := natstest.New(t).Setup()
			b := &sweepBundle{js: js, db: dbtest.SQLite(t)}
			b.Sweeper = deadletter.NewSweeper(js, b.db)
			b.MinAge = 0
			b.letter(t, "first", true)
			assert.NotZero(t, b.sweep(t).Read)
			odd(t, b)
			assert.NotZero(t, b.sweep(t).Read, "the numbers have changed")
			for range 3 {
				assert.Zero(t, b.sweep(t).Read, "it is known what makes the difference")
			}
			b.letter(t, "usual", true)
			assert.Zero(t, b.sweep(t).Read, "the difference is the same")
			b.letter(t, "lost", false)
			assert.Equal(t, 1, b.sweep(t).Indexed)
			assert.Zero(t, b.sweep(t).Indexed)
			assert.Zero(t, b.sweep(t).Read)
			b.Later(time.Hour)
			assert.NotZero(t, b.sweep(t).Read, "once an hour all the same")
			assert.Zero(t, b.sweep(t).Read)
		})
	}
}

// TestALetterWhoseRowIsRefusedDoesNotEndTheSweep: the others are indexed, and the one is not tried every minute.
func TestALetterWhoseRowIsRefusedDoesNotEndTheSweep(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		refuse := []string{`CREATE TRIGGER refuses BEFORE INSERT ON deliveries WHEN NEW.event_id = 'bad' BEGIN SELECT RAISE(ABORT, 'no'); END`}
		if database.IsPostgres(db) {
			refuse = []string{
				`CREATE FUNCTION refuses() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''no''; END'`,
				`CREATE TRIGGER refuses BEFORE INSERT ON deliveries FOR EACH ROW WHEN (NEW.event_id = 'bad') EXECUTE FUNCTION refuses()`,
			}
		}
		for _, statement := range refuse {
			require.NoError(t, db.Exec(statement).Error)
		}
		_, js := natstest.New(t).Setup()
		b := &sweepBundle{js: js, db: db}
		b.Sweeper = deadletter.NewSweeper(js, db)
		b.MinAge = 0
		b.Refuses = func(err error) bool { return database.IsRefusal(err) && !database.IsInfrastructure(err) }
		b.letter(t, "first", false)
		b.letter(t, "bad", false)
		b.letter(t, "last", false)
		swept, err := b.Sweep(t.Context())
		require.ErrorContains(t, err, "index dead letter 2")
		assert.Equal(t, 2, swept.Indexed)
		assert.Zero(t, b.sweep(t).Read, "not again before an hour has passed")
	})
}

// TestSweepComesBackForALetterThatWasTooYoung although the numbers do not change any more.
func TestSweepComesBackForALetterThatWasTooYoung(t *testing.T) {
	t.Parallel()
	_, js := natstest.New(t).Setup()
	b := &sweepBundle{js: js, db: dbtest.SQLite(t)}
	b.Sweeper = deadletter.NewSweeper(js, b.db)
	b.MinAge = time.Hour
	b.letter(t, "lost", false)
	b.letter(t, "usual", true)
	assert.Equal(t, deadletter.Swept{}, b.sweep(t))
	b.MinAge = 0
	assert.Equal(t, deadletter.Swept{Read: 2, Indexed: 1}, b.sweep(t))
	assert.Zero(t, b.sweep(t))
}

type sweepBundle struct {
	*deadletter.Sweeper
	js jetstream.JetStream
	db *gorm.DB
}

// letter puts a letter, and writes its row or not.
func (b *sweepBundle) letter(t *testing.T, id string, row bool) {
	t.Helper()
	seq := put(t, b.js, "mirror", id, 5)
	if row {
		require.NoError(t, b.db.Create(ptr(dead(id, seq))).Error)
	}
}

func (b *sweepBundle) sweep(t *testing.T) deadletter.Swept {
	t.Helper()
	swept, err := b.Sweep(t.Context())
	require.NoError(t, err)
	return swept
}
