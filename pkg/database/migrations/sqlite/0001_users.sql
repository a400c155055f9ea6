-- +goose Up
-- One table a resource, one row an object. pkg/mirror is the only writer. There are no foreign keys and nothing
-- but id is unique: events come in any order, and Clerk reuses addresses.
-- datetime columns hold text of one fixed width in UTC (2026-01-15 10:00:00.036+00:00), so that it sorts.
CREATE TABLE users (
    id               text PRIMARY KEY,
    source           text NOT NULL,                              -- the configured Clerk instance
    email            text,                                       -- the primary address; any case, as Clerk sent it
    email_verified   boolean NOT NULL DEFAULT false,
    phone            text,
    username         text,
    first_name       text,
    last_name        text,
    image_url        text,
    has_image        boolean NOT NULL DEFAULT false,
    banned           boolean NOT NULL DEFAULT false,
    locked           boolean NOT NULL DEFAULT false,
    external_id      text,
    public_metadata  text,
    unsafe_metadata  text,
    private_metadata text,
    last_sign_in_at  datetime,
    last_active_at   datetime,
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
-- Sign-in and support look people up by address, whatever its case. Clerk says which address is unique, not we.
CREATE INDEX users_email ON users (lower(email)) WHERE deleted_at IS NULL AND email IS NOT NULL;
-- The application's own id of the person.
CREATE INDEX users_external_id ON users (external_id) WHERE external_id IS NOT NULL;

-- The arrays inside a user, one row an element, of users that are not deleted.
CREATE VIEW user_emails AS
SELECT u.id AS user_id,
       json_extract(e.value, '$.id') AS id,
       json_extract(e.value, '$.email_address') AS email_address,
       COALESCE(json_extract(e.value, '$.verification.status') = 'verified', 0) AS verified,
       COALESCE(json_extract(e.value, '$.id') = json_extract(u.raw, '$.primary_email_address_id'), 0) AS is_primary
FROM users u
JOIN json_each(
    CASE WHEN json_type(u.raw, '$.email_addresses') = 'array' THEN json_extract(u.raw, '$.email_addresses') ELSE '[]' END) AS e
WHERE u.deleted_at IS NULL AND e.type = 'object';

CREATE VIEW user_phones AS
SELECT u.id AS user_id,
       json_extract(e.value, '$.id') AS id,
       json_extract(e.value, '$.phone_number') AS phone_number,
       COALESCE(json_extract(e.value, '$.verification.status') = 'verified', 0) AS verified,
       COALESCE(json_extract(e.value, '$.id') = json_extract(u.raw, '$.primary_phone_number_id'), 0) AS is_primary
FROM users u
JOIN json_each(
    CASE WHEN json_type(u.raw, '$.phone_numbers') = 'array' THEN json_extract(u.raw, '$.phone_numbers') ELSE '[]' END) AS e
WHERE u.deleted_at IS NULL AND e.type = 'object';

CREATE VIEW user_accounts AS
SELECT u.id AS user_id,
       json_extract(e.value, '$.id') AS id,
       json_extract(e.value, '$.provider') AS provider,
       json_extract(e.value, '$.provider_user_id') AS provider_user_id,
       json_extract(e.value, '$.email_address') AS email_address,
       json_extract(e.value, '$.username') AS username,
       COALESCE(json_extract(e.value, '$.verification.status') = 'verified', 0) AS verified
FROM users u
JOIN json_each(
    CASE WHEN json_type(u.raw, '$.external_accounts') = 'array' THEN json_extract(u.raw, '$.external_accounts') ELSE '[]' END) AS e
WHERE u.deleted_at IS NULL AND e.type = 'object';
