package worker_test

import (
	"testing"

	"gorm.io/gorm"

	"github.com/usherhq/usher/worker"
	"github.com/usherhq/usher/worker/internal/handlertest"
)

func TestMirrorConforms(t *testing.T) {
	t.Parallel()
	handlertest.Run(t, func(t testing.TB, _ *gorm.DB) worker.Handler {
		t.Helper()
		for _, r := range worker.Handlers() {
			if r.Handler.Name() == "mirror" {
				return r.Handler
			}
		}
		t.Fatal("no handler mirror")
		return nil
	})
}
