// Package outbox keeps what is to be said to people: mail and chat messages, as rows of the table notifications.
//
// A notification is enqueued in the transaction of the change that is its cause, so that both are there or neither, and under a
// key that names the cause, so that no repetition, replay or restart says it twice on one channel. What the settings give
// no way for is kept too, as suppressed, and can be read there. The package refuses to send: a mail server that is
// away must not hold up a transaction.
package outbox

import (
	"fmt"
	"time"

	"github.com/segmentio/ksuid"
	"gorm.io/gorm"
	"gorm.io/gorm/clause"

	"github.com/usherhq/usher/pkg/config"
)

// Channel is a way to people.
type Channel string

// The channels.
const (
	Email Channel = "email"
	Slack Channel = "slack"
)

// Status is how far a notification has come.
type Status string

// The states. Sent, Failed and Suppressed are final.
const (
	Pending    Status = "pending"
	Sent       Status = "sent"
	Failed     Status = "failed"     // every try was refused
	Suppressed Status = "suppressed" // the settings have no way to send it
)

// Notification is a row of the table notifications.
type Notification struct {
	ID        string // given by [Enqueue]; sorts by time
	EffectKey string // names the cause; required
	Channel   Channel
	Kind      string // what it is about, such as "silence"
	Status    Status // given by Enqueue: Pending, unless it is Suppressed
	Recipient string // of mail
	Subject   string // one line; the whole of a message that must be short
	Body      string // plain text
	Source    string // empty where it is about none
	UserID    string
	EventID   string
	CreatedAt time.Time // given by Enqueue
	SentAt    *time.Time
	Error     *string
}

// TableName implements gorm's tabler.
func (Notification) TableName() string { return "notifications" }

// Enqueue writes a notification in the caller's transaction, unless its effect has one on that channel already; false then.
func Enqueue(tx *gorm.DB, n Notification) (bool, error) {
	n.ID, n.CreatedAt = ksuid.New().String(), time.Now().UTC()
	if n.Status != Suppressed {
		n.Status = Pending
	}
	result := tx.Clauses(clause.OnConflict{Columns: []clause.Column{{Name: "effect_key"}, {Name: "channel"}}, DoNothing: true}).Create(&n)
	if result.Error != nil {
		return false, fmt.Errorf("enqueue %s: %w", n.EffectKey, result.Error)
	}
	return result.RowsAffected > 0, nil
}

// Alerts says where alerts to operators go.
type Alerts struct {
	Email string // the receiver; empty for none
	Mail  bool   // there is a mail server
	Slack bool   // there is a Slack webhook
}

// AlertsFrom says what the settings have for alerts.
func AlertsFrom(s *config.Settings) Alerts {
	return Alerts{Email: s.AlertEmail, Mail: s.SMTPURL != "", Slack: s.SlackWebhookURL != ""}
}

// Enqueue writes an alert for every channel that the settings have a receiver on, as [Enqueue] does; Channel, Recipient and Status are
// given by it. Where there is none it is kept as one suppressed mail. False where the alert was there already.
func (a Alerts) Enqueue(tx *gorm.DB, n Notification) (bool, error) {
	var ways []Notification
	if a.Slack {
		n.Channel, n.Status = Slack, Pending
		ways = append(ways, n)
	}
	if a.Email != "" || !a.Slack {
		n.Channel, n.Recipient, n.Status = Email, a.Email, Suppressed
		if a.Mail && a.Email != "" {
			n.Status = Pending
		}
		ways = append(ways, n)
	}
	written := false
	for _, way := range ways {
		is, err := Enqueue(tx, way)
		if err != nil {
			return false, err
		}
		written = written || is
	}
	return written, nil
}
