package event_test

import (
	"strings"
	"testing"
	"time"

	"github.com/usherhq/usher/pkg/event"
)

func TestComposedEventReadsLikeOneOfClerks(t *testing.T) {
	t.Parallel()
	at := time.UnixMilli(1_700_000_000_123)
	e := event.Compose("user.updated", []byte(`{"id":"user_1","object":"user","updated_at":1690000000000}`), `ins_"1`, at)
	if e.Type != "user.updated" || e.Object.ID != "user_1" || e.Object.UserID != "user_1" || e.InstanceID != `ins_"1` || e.Timestamp != at.UnixMilli() || e.Object.UpdatedAt != 1690000000000 {
		t.Fatalf("%+v", e)
	}
	if e = event.Compose("user.updated", []byte(`{"id":"user_1"}`), "", at); strings.Contains(string(e.Raw), "instance_id") {
		t.Fatal(string(e.Raw))
	}
	if e = event.Compose("user.updated", []byte(`no object`), "", at); e.Type != "user.updated" || !strings.Contains(string(e.Raw), "no object") {
		t.Fatalf("%+v", e)
	}
}

func TestReconciledIDIsTheSameForTheSameThing(t *testing.T) {
	t.Parallel()
	a, b := event.ReconciledID([]byte("a"), 0), event.ReconciledID([]byte("a"), 0)
	if a != b || !strings.HasPrefix(a, "rec_") {
		t.Fatal(a, b)
	}
	if event.ReconciledID([]byte("a"), 1) == a || event.ReconciledID([]byte("b"), 0) == a {
		t.Fatal("two things have one id")
	}
}
