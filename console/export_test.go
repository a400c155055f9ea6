package console

import (
	"net"
	"time"

	"go.uber.org/zap"
)

// SessionAt is the cookie that a login with a token would have set at a time.
func SessionAt(token string, at time.Time) string {
	return newAccess(Config{AdminToken: token}, &net.TCPAddr{}, Deps{}, zap.NewNop()).newSession(at)
}
