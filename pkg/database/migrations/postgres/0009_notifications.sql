-- +goose Up
-- The outbox: what is to be said to people. A row is written with the change that is its cause; each effect has one row.
CREATE TABLE notifications (
    id         text PRIMARY KEY,          -- sorts by time
    effect_key text NOT NULL,             -- the cause: said once on each channel
    channel    text NOT NULL CHECK (channel IN ('email', 'slack')),
    kind       text NOT NULL,             -- silence, silence_over
    status     text NOT NULL CHECK (status IN ('pending', 'sent', 'failed', 'suppressed')),
    recipient  text NOT NULL DEFAULT '',  -- of mail
    subject    text NOT NULL,
    body       text NOT NULL,
    source     text NOT NULL DEFAULT '',
    user_id    text NOT NULL DEFAULT '',
    event_id   text NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL,
    sent_at    timestamptz,
    error      text,
    UNIQUE (effect_key, channel)
);
CREATE INDEX notifications_pending ON notifications (created_at) WHERE status = 'pending';
