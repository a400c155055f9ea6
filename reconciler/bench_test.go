package reconciler_test

import (
	"context"
	"net/http/httptest"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/reconciler"
)

// BenchmarkCleanDiff compares so many users as USHER_BENCH_USERS says, all of them mirrored, in a process of its own, and
// reports the time and the most memory that it had: go test -run '^$' -bench CleanDiff -benchtime 1x.
func BenchmarkCleanDiff(b *testing.B) {
	users, _ := strconv.Atoi(os.Getenv("USHER_BENCH_USERS"))
	if users == 0 {
		b.Skip("USHER_BENCH_USERS is not set")
	}
	for name, open := range map[string]func(testing.TB) string{"postgres": dbtest.PostgresURL, "sqlite": dbtest.SQLiteURL} {
		b.Run(name, func(b *testing.B) {
			url := open(b)
			db := dbtest.Open(b, url)
			crowd := emulator.NewCrowd(users)
			fill(b, db, crowd)
			server := httptest.NewServer(emulator.New(emulator.Config{}).API(emulator.APIConfig{Key: key, Crowd: crowd}))
			defer server.Close()
			broker := natstest.New(b)
			broker.Setup(stream.HandlerSpec{Name: "mirror"})
			for b.Loop() {
				cmd := exec.CommandContext(b.Context(), os.Args[0])
				cmd.Env = append(os.Environ(), "RECONCILER_CHILD=verify", "CHILD_DATABASE="+url, "CHILD_NATS="+broker.URL(), "CHILD_API="+server.URL+"/v1")
				out, err := cmd.CombinedOutput()
				require.NoError(b, err, string(out))
				// On a shared machine the processor's time says more than the clock's.
				b.ReportMetric((cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds(), "cpu-s")
				fields := strings.Fields(string(out))
				require.Len(b, fields, 3, string(out))
				require.Equal(b, strconv.Itoa(users), fields[0])
				kib, _ := strconv.ParseFloat(fields[1], 64)
				b.ReportMetric(kib/1024, "MiB-RSS")
				require.Equal(b, "0", fields[2], "drift")
			}
		})
	}
}

func fill(b *testing.B, db *gorm.DB, crowd *emulator.Crowd) {
	b.Helper()
	var batch []event.Event
	flush := func() {
		require.NoError(b, apply(b.Context(), db, batch))
		batch = batch[:0]
	}
	for o := range crowd.All() {
		body := append(append([]byte(`{"type":"user.created","timestamp":`+strconv.FormatInt(o.UpdatedAt, 10)+`,"data":`), o.JSON...), '}')
		e, err := event.Decode(body)
		require.NoError(b, err)
		e.ID, e.Source, e.Origin = "msg_"+o.ID, "clerk", event.OriginWebhook
		if batch = append(batch, e); len(batch) == 2000 {
			flush()
		}
	}
	flush()
}

// verifyChild verifies the users once and prints how many it saw, the most memory it had (KiB), and the drift.
func verifyChild() {
	reconciler.RealPages()
	ctx := context.Background()
	db, err := database.Open(ctx, os.Getenv("CHILD_DATABASE"), dbtest.Schema)
	if err != nil {
		panic(err)
	}
	nc, err := stream.Connect(os.Getenv("CHILD_NATS"), "", "bench", zap.NewNop())
	if err != nil {
		panic(err)
	}
	js, err := stream.JetStream(nc)
	if err != nil {
		panic(err)
	}
	client, err := reconciler.Client(clerk.Source{Name: "clerk", APIURL: os.Getenv("CHILD_API"), SecretKey: key, Quota: -1}, zap.NewNop(), reconciler.NewMetrics(nil))
	if err != nil {
		panic(err)
	}
	sweeper := reconciler.NewSweeper(reconciler.SweepConfig{Source: "clerk"}, reconciler.SweepDeps{API: client, DB: db, JS: js, Log: zap.NewNop()})
	report, err := sweeper.Verify(ctx, reconciler.Options{Resources: []string{"users"}})
	if err != nil {
		panic(err)
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		panic(err)
	}
	peak := "0"
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			peak = strings.Fields(rest)[0]
		}
	}
	_, _ = os.Stdout.WriteString(strconv.FormatInt(report.Checked["users"], 10) + " " + peak + " " + strconv.FormatInt(report.Drift.Sum(), 10) + "\n")
}
