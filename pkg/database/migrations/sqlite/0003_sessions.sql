-- +goose Up
CREATE TABLE sessions (
    id                          text PRIMARY KEY,
    source                      text NOT NULL,                              -- the configured Clerk instance
    user_id                     text,
    client_id                   text,
    status                      text,
    ended                       boolean NOT NULL DEFAULT false,             -- ended, removed, revoked, expired, replaced, abandoned, or deleted: it never goes back
    last_active_organization_id text,
    actor                       text,
    ip_address                  text,
    city                        text,
    country                     text,
    browser_name                text,
    device_type                 text,
    is_mobile                   boolean NOT NULL DEFAULT false,
    last_active_at              datetime,
    expire_at                   datetime,
    abandon_at                  datetime,
    clerk_created_at            datetime,
    clerk_updated_at            datetime,
    version                     bigint NOT NULL,                            -- with seen_at and event_id: which state of the object wins
    seen_at                     bigint NOT NULL,                            -- ms since the epoch
    deleted_at                  datetime,                                   -- set: a tombstone, the object is gone at Clerk
    raw                         text NOT NULL,                              -- the object, as Clerk sent it
    event_id                    text NOT NULL,                              -- the event that wrote this state; compared by bytes
    origin                      text NOT NULL,
    synced_at                   datetime NOT NULL                           -- when the row was written
);
-- One person's sessions: the fraud rules, a person's page.
CREATE INDEX sessions_user ON sessions (user_id);
