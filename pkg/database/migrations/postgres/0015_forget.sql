-- +goose Up
-- Who is deleted is not named any more (pkg/mirror, forget.go). last_deleted_at is the newest delete that was seen of a user, be it older than the row or not.
ALTER TABLE users ADD COLUMN last_deleted_at timestamptz;
CREATE INDEX organization_invitations_user ON organization_invitations (user_id) WHERE user_id IS NOT NULL;
CREATE INDEX organization_invitations_inviter ON organization_invitations (inviter_id) WHERE inviter_id IS NOT NULL;
CREATE INDEX subscription_items_payer_user ON subscription_items (payer_user_id) WHERE payer_user_id IS NOT NULL;
CREATE INDEX payment_attempts_payer_user ON payment_attempts (payer_user_id) WHERE payer_user_id IS NOT NULL;

-- What was deleted before this version.
UPDATE users SET last_deleted_at = deleted_at, synced_at = now(),
    raw = jsonb_strip_nulls(jsonb_build_object('id', raw -> 'id', 'object', raw -> 'object', 'deleted', raw -> 'deleted')),
    email = NULL, phone = NULL, username = NULL, first_name = NULL, last_name = NULL, image_url = NULL, external_id = NULL,
    public_metadata = NULL, unsafe_metadata = NULL, private_metadata = NULL, last_sign_in_at = NULL, last_active_at = NULL, clerk_created_at = NULL, clerk_updated_at = NULL,
    email_verified = false, has_image = false, banned = false, locked = false
WHERE deleted_at IS NOT NULL;
UPDATE sessions SET ip_address = NULL, city = NULL, synced_at = now(), raw = jsonb_build_object('user_id', user_id) ||
    CASE jsonb_typeof(raw -> 'latest_activity') WHEN 'object' THEN jsonb_set(raw, '{latest_activity}', (raw -> 'latest_activity') - 'ip_address' - 'city') ELSE raw END - 'user'
WHERE (user_id, source) IN (SELECT id, source FROM users WHERE deleted_at IS NOT NULL);
UPDATE organization_memberships SET synced_at = now(), raw = raw || jsonb_build_object('public_user_data', jsonb_build_object('user_id', user_id))
WHERE (user_id, source) IN (SELECT id, source FROM users WHERE deleted_at IS NOT NULL) AND raw ? 'public_user_data';
UPDATE organization_invitations SET email = NULL, synced_at = now(), raw = raw - 'email_address' - 'url'
WHERE (user_id, source) IN (SELECT id, source FROM users WHERE deleted_at IS NOT NULL);
UPDATE organization_invitations SET synced_at = now(), raw = raw || jsonb_build_object('public_inviter_data', jsonb_build_object('user_id', inviter_id))
WHERE (inviter_id, source) IN (SELECT id, source FROM users WHERE deleted_at IS NOT NULL) AND raw ? 'public_inviter_data';
UPDATE subscriptions SET synced_at = now(), raw = raw || jsonb_build_object('payer', (raw -> 'payer') - 'email' - 'first_name' - 'last_name' - 'image_url' - 'organization_name')
WHERE (payer_user_id, source) IN (SELECT id, source FROM users WHERE deleted_at IS NOT NULL) AND jsonb_typeof(raw -> 'payer') = 'object';
UPDATE subscription_items SET synced_at = now(), raw = raw || jsonb_build_object('payer', (raw -> 'payer') - 'email' - 'first_name' - 'last_name' - 'image_url' - 'organization_name')
WHERE (payer_user_id, source) IN (SELECT id, source FROM users WHERE deleted_at IS NOT NULL) AND jsonb_typeof(raw -> 'payer') = 'object';
UPDATE payment_attempts SET synced_at = now(), raw = raw || jsonb_build_object('payer', (raw -> 'payer') - 'email' - 'first_name' - 'last_name' - 'image_url' - 'organization_name')
WHERE (payer_user_id, source) IN (SELECT id, source FROM users WHERE deleted_at IS NOT NULL) AND jsonb_typeof(raw -> 'payer') = 'object';
