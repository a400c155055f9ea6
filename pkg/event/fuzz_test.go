package event_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"testing"

	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/fixture"
)

// FuzzDecode wants that no body makes Decode panic, that its only error is ErrMalformed, and that what it
// decodes is the type and the data that encoding/json finds.
func FuzzDecode(f *testing.F) {
	for _, typ := range fixture.Types() {
		body, _ := fixture.Event(typ)
		f.Add(body)
	}
	for _, name := range fixture.Variants() {
		body, _ := fixture.Variant(name)
		f.Add(body)
	}
	for _, body := range []string{
		"", "null", "[]", `{"type":"a","data":{}}`, `{"type":"a","data":{},"data":{"id":"x"}}`, `{"type":"a","data":{"id":{"id":1}}}`,
		`{"type":"\u0061","data":{"\u0069d":"x"}}`, "\ufeff{}", `{"type":"a","timestamp":1e400,"data":{"updated_at":"-1"}}`, `{"Type":"a","DATA":{}}`,
	} {
		f.Add([]byte(body))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		before := bytes.Clone(body)
		e, err := event.Decode(body)
		if !bytes.Equal(before, body) {
			t.Fatal("the body was changed")
		}
		if err != nil {
			if !errors.Is(err, event.ErrMalformed) {
				t.Fatalf("error is not ErrMalformed: %v", err)
			}
			if e.Type != "" || e.Data != nil {
				t.Fatalf("an error and an event: %+v", e)
			}
			return
		}
		var want map[string]json.RawMessage
		if err := json.Unmarshal(body, &want); err != nil {
			t.Fatalf("decoded what is not JSON: %v", err)
		}
		var typ string
		if err := json.Unmarshal(want["type"], &typ); err != nil || typ != string(e.Type) {
			t.Fatalf("type %q, want %q (%v)", e.Type, typ, err)
		}
		if !bytes.Equal(want["data"], e.Data) {
			t.Fatalf("data %s, want %s", e.Data, want["data"])
		}
		if !bytes.Equal(e.Raw, body) {
			t.Fatal("raw is not the body")
		}
		if e.Key() == "" {
			t.Fatal("no key")
		}
		v := e.Version()
		if v.Version < 1 || v.SeenAt < 0 {
			t.Fatalf("version %+v", v)
		}
		again, err := event.Decode(e.Raw)
		if err != nil || again.Object != e.Object || again.Version() != v {
			t.Fatalf("decoded differently the second time: %+v and %+v (%v)", e.Object, again.Object, err)
		}
	})
}
