-- +goose Up
-- Who is deleted is not named any more (pkg/mirror, forget.go). last_deleted_at is the newest delete that was seen of a user, be it older than the row or not.
ALTER TABLE users ADD COLUMN last_deleted_at datetime;
CREATE INDEX organization_invitations_user ON organization_invitations (user_id) WHERE user_id IS NOT NULL;
CREATE INDEX organization_invitations_inviter ON organization_invitations (inviter_id) WHERE inviter_id IS NOT NULL;
CREATE INDEX subscription_items_payer_user ON subscription_items (payer_user_id) WHERE payer_user_id IS NOT NULL;
CREATE INDEX payment_attempts_payer_user ON payment_attempts (payer_user_id) WHERE payer_user_id IS NOT NULL;

-- What was deleted before this version.
UPDATE users SET last_deleted_at = deleted_at,
    raw = json_object('id', id, 'object', 'user', 'deleted', json('true')),
    email = NULL, phone = NULL, username = NULL, first_name = NULL, last_name = NULL, image_url = NULL, external_id = NULL,
    public_metadata = NULL, unsafe_metadata = NULL, private_metadata = NULL, last_sign_in_at = NULL, last_active_at = NULL, clerk_created_at = NULL, clerk_updated_at = NULL,
    email_verified = false, has_image = false, banned = false, locked = false
WHERE deleted_at IS NOT NULL;
UPDATE sessions SET ip_address = NULL, city = NULL, raw = json_set(json_remove(raw, '$.user', '$.latest_activity.ip_address', '$.latest_activity.city'), '$.user_id', user_id)
WHERE (user_id, source) IN (SELECT id, source FROM users WHERE deleted_at IS NOT NULL);
UPDATE organization_memberships SET raw = json_set(raw, '$.public_user_data', json_object('user_id', user_id))
WHERE (user_id, source) IN (SELECT id, source FROM users WHERE deleted_at IS NOT NULL) AND json_type(raw, '$.public_user_data') = 'object';
UPDATE organization_invitations SET email = NULL, raw = json_remove(raw, '$.email_address', '$.url')
WHERE (user_id, source) IN (SELECT id, source FROM users WHERE deleted_at IS NOT NULL);
UPDATE organization_invitations SET raw = json_set(raw, '$.public_inviter_data', json_object('user_id', inviter_id))
WHERE (inviter_id, source) IN (SELECT id, source FROM users WHERE deleted_at IS NOT NULL) AND json_type(raw, '$.public_inviter_data') = 'object';
UPDATE subscriptions SET raw = json_remove(raw, '$.payer.email', '$.payer.first_name', '$.payer.last_name', '$.payer.image_url', '$.payer.organization_name')
WHERE (payer_user_id, source) IN (SELECT id, source FROM users WHERE deleted_at IS NOT NULL);
UPDATE subscription_items SET raw = json_remove(raw, '$.payer.email', '$.payer.first_name', '$.payer.last_name', '$.payer.image_url', '$.payer.organization_name')
WHERE (payer_user_id, source) IN (SELECT id, source FROM users WHERE deleted_at IS NOT NULL);
UPDATE payment_attempts SET raw = json_remove(raw, '$.payer.email', '$.payer.first_name', '$.payer.last_name', '$.payer.image_url', '$.payer.organization_name')
WHERE (payer_user_id, source) IN (SELECT id, source FROM users WHERE deleted_at IS NOT NULL);
