package command

import (
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/usherhq/usher/pkg/emulator"
)

// Most instances have no organizations.
func TestAnInstanceWithoutOrganizationsIsComparedWithoutThem(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		r, clerk, api := clerkRoad(t, url, emulator.Config{Seed: 11})
		r.deliver(clerk, 60, emulator.Faults{})
		api.SwitchOff(emulator.Organizations, emulator.Waitlist)

		result := r.Run("verify").want(exitOK)
		assert.Regexp(t, `users +\d+\n`, result.out)
		assert.Regexp(t, `organizations +0 \(the instance does without it\)\n`, result.out)
		assert.Contains(t, r.report(exitOK, "verify").Absent, "organizations")
		r.Run("verify", "--resource", "organizations").want(exitOK)
		r.Run("reconcile", "--full").want(exitOK)
		clerk.SignUp() // nobody hears of it
		found := r.report(exitOK, "reconcile")
		assert.EqualValues(t, 1, found.Drift.Missing)
		assert.EqualValues(t, 1, found.Published)
		r.quiet()
		again := r.report(exitOK, "backfill")
		assert.Zero(t, again.Published)
		assert.Zero(t, again.Checked["organizations"])
		r.Run("verify").want(exitOK)
	})
}
