-- +goose Up
CREATE TABLE waitlist_entries (
    id               text PRIMARY KEY,
    source           text NOT NULL,                              -- the configured Clerk instance
    email            text,
    status           text,
    is_locked        boolean NOT NULL DEFAULT false,
    invitation_id    text,
    clerk_created_at datetime,
    clerk_updated_at datetime,
    version          bigint NOT NULL,                            -- with seen_at and event_id: which state of the object wins
    seen_at          bigint NOT NULL,                            -- ms since the epoch
    deleted_at       datetime,                                   -- set: a tombstone, the object is gone at Clerk
    raw              text NOT NULL,                              -- the object, as Clerk sent it
    event_id         text NOT NULL,                              -- the event that wrote this state; compared by bytes
    origin           text NOT NULL,
    synced_at        datetime NOT NULL                           -- when the row was written
);
