package mirror_test

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/mirror"
)

func TestLivingRowsAreReadAsJSONShowsThem(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		at := int64(1_768_500_000_123)
		for i, id := range []string{"user_1", "user_2", "user_3"} {
			apply(t, db, decode(t, "msg_"+id, bodyOf(t, "user.created", at+int64(i), map[string]any{
				"id": id, "object": "user", "username": id, "banned": true, "public_metadata": map[string]any{"plan": "pro"}, "created_at": at, "updated_at": at, "last_sign_in_at": nil,
			})))
		}
		apply(t, db, decode(t, "msg_gone", bodyOf(t, "user.deleted", at+10, map[string]any{"id": "user_2", "object": "user", "deleted": true})))
		rows, err := mirror.Living(t.Context(), db, "users", "clerk", []string{"user_1", "user_2", "user_none"})
		require.NoError(t, err)
		require.Len(t, rows, 1, "neither the deleted one nor one that was not asked for")
		text, err := json.Marshal(rows["user_1"])
		require.NoError(t, err)
		var got map[string]any
		require.NoError(t, json.Unmarshal(text, &got))
		assert.Equal(t, "user_1", got["username"])
		assert.Equal(t, true, got["banned"])
		assert.Equal(t, map[string]any{"plan": "pro"}, got["public_metadata"])
		assert.Equal(t, time.UnixMilli(at).UTC().Format(time.RFC3339Nano), got["clerk_created_at"])
		assert.InDelta(t, at, got["version"], 0)
		assert.Nil(t, got["last_sign_in_at"])
		assert.Nil(t, got["email"])
		assert.NotContains(t, got, "raw")

		rows, err = mirror.Living(t.Context(), db, "users", "staging", []string{"user_1"})
		require.NoError(t, err)
		assert.Empty(t, rows, "of another source")
		_, err = mirror.Living(t.Context(), db, "deliveries", "clerk", nil)
		require.ErrorContains(t, err, "no table")
		for _, table := range mirror.Tables() {
			_, err := mirror.Living(t.Context(), db, table.Name, "clerk", []string{"x"})
			require.NoError(t, err, table.Name)
		}
	})
}
