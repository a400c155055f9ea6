-- +goose Up
-- One table a resource, one row an object. pkg/mirror is the only writer. There are no foreign keys and nothing
-- but id is unique: events come in any order, and Clerk reuses addresses.
-- Rows change often and their indexed columns rarely: the free tenth of a page keeps updates out of the indexes.
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
    public_metadata  jsonb,
    unsafe_metadata  jsonb,
    private_metadata jsonb,
    last_sign_in_at  timestamptz,
    last_active_at   timestamptz,
    clerk_created_at timestamptz,
    clerk_updated_at timestamptz,
    version          bigint NOT NULL,                            -- with seen_at and event_id: which state of the object wins
    seen_at          bigint NOT NULL,                            -- ms since the epoch
    deleted_at       timestamptz,                                -- set: a tombstone, the object is gone at Clerk
    raw              jsonb NOT NULL,                             -- the object, as Clerk sent it
    event_id         text COLLATE "C" NOT NULL,                  -- the event that wrote this state; compared by bytes
    origin           text NOT NULL,
    synced_at        timestamptz NOT NULL                        -- when the row was written
) WITH (fillfactor = 90);
-- Sign-in and support look people up by address, whatever its case. Clerk says which address is unique, not we.
CREATE INDEX users_email ON users (lower(email)) WHERE deleted_at IS NULL AND email IS NOT NULL;
-- The application's own id of the person.
CREATE INDEX users_external_id ON users (external_id) WHERE external_id IS NOT NULL;

-- lz4 takes a fraction of the time of pglz. A server that was built without it keeps its default.
-- +goose StatementBegin
DO $$
BEGIN
    ALTER TABLE users ALTER COLUMN raw SET COMPRESSION lz4;
EXCEPTION WHEN feature_not_supported THEN
    NULL;
END
$$;
-- +goose StatementEnd

-- The arrays inside a user, one row an element, of users that are not deleted.
CREATE VIEW user_emails AS
SELECT u.id AS user_id,
       e ->> 'id' AS id,
       e ->> 'email_address' AS email_address,
       COALESCE(e -> 'verification' ->> 'status' = 'verified', false) AS verified,
       COALESCE(e ->> 'id' = u.raw ->> 'primary_email_address_id', false) AS is_primary
FROM users u
CROSS JOIN LATERAL jsonb_array_elements(
    CASE WHEN jsonb_typeof(u.raw -> 'email_addresses') = 'array' THEN u.raw -> 'email_addresses' ELSE '[]' END) AS e
WHERE u.deleted_at IS NULL AND jsonb_typeof(e) = 'object';

CREATE VIEW user_phones AS
SELECT u.id AS user_id,
       e ->> 'id' AS id,
       e ->> 'phone_number' AS phone_number,
       COALESCE(e -> 'verification' ->> 'status' = 'verified', false) AS verified,
       COALESCE(e ->> 'id' = u.raw ->> 'primary_phone_number_id', false) AS is_primary
FROM users u
CROSS JOIN LATERAL jsonb_array_elements(
    CASE WHEN jsonb_typeof(u.raw -> 'phone_numbers') = 'array' THEN u.raw -> 'phone_numbers' ELSE '[]' END) AS e
WHERE u.deleted_at IS NULL AND jsonb_typeof(e) = 'object';

CREATE VIEW user_accounts AS
SELECT u.id AS user_id,
       e ->> 'id' AS id,
       e ->> 'provider' AS provider,
       e ->> 'provider_user_id' AS provider_user_id,
       e ->> 'email_address' AS email_address,
       e ->> 'username' AS username,
       COALESCE(e -> 'verification' ->> 'status' = 'verified', false) AS verified
FROM users u
CROSS JOIN LATERAL jsonb_array_elements(
    CASE WHEN jsonb_typeof(u.raw -> 'external_accounts') = 'array' THEN u.raw -> 'external_accounts' ELSE '[]' END) AS e
WHERE u.deleted_at IS NULL AND jsonb_typeof(e) = 'object';
