-- +goose Up
CREATE TABLE sessions (
    id                          text PRIMARY KEY,
    source                      text NOT NULL,                              -- the configured Clerk instance
    user_id                     text,
    client_id                   text,
    status                      text,
    ended                       boolean NOT NULL DEFAULT false,             -- ended, removed, revoked, expired, replaced, abandoned, or deleted: it never goes back
    last_active_organization_id text,
    actor                       jsonb,
    ip_address                  text,
    city                        text,
    country                     text,
    browser_name                text,
    device_type                 text,
    is_mobile                   boolean NOT NULL DEFAULT false,
    last_active_at              timestamptz,
    expire_at                   timestamptz,
    abandon_at                  timestamptz,
    clerk_created_at            timestamptz,
    clerk_updated_at            timestamptz,
    version                     bigint NOT NULL,                            -- with seen_at and event_id: which state of the object wins
    seen_at                     bigint NOT NULL,                            -- ms since the epoch
    deleted_at                  timestamptz,                                -- set: a tombstone, the object is gone at Clerk
    raw                         jsonb NOT NULL,                             -- the object, as Clerk sent it
    event_id                    text COLLATE "C" NOT NULL,                  -- the event that wrote this state; compared by bytes
    origin                      text NOT NULL,
    synced_at                   timestamptz NOT NULL                        -- when the row was written
) WITH (fillfactor = 90);
-- One person's sessions: the fraud rules, a person's page.
CREATE INDEX sessions_user ON sessions (user_id);

-- lz4 takes a fraction of the time of pglz. A server that was built without it keeps its default.
-- +goose StatementBegin
DO $$
BEGIN
    ALTER TABLE sessions ALTER COLUMN raw SET COMPRESSION lz4;
EXCEPTION WHEN feature_not_supported THEN
    NULL;
END
$$;
-- +goose StatementEnd
