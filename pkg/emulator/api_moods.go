package emulator

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
)

// Mood is one way in which the Backend API lets a caller down.
type Mood string

// The moods. The first ones strike any request, the last ones only lists and counts.
const (
	Limited     Mood = "429"       // too many requests, as JSON, with Retry-After in seconds
	LimitedText Mood = "429-text"  // the same as plain text
	LimitedDate Mood = "429-date"  // the same with Retry-After as a date
	LimitedBare Mood = "429-bare"  // without Retry-After
	BadGateway  Mood = "502"       // a proxy's page in HTML
	Unavailable Mood = "503"       // an error as JSON
	Redirect    Mood = "redirect"  // a 3xx with nothing in it
	Empty       Mood = "empty"     // 200 with nothing in it
	Garbled     Mood = "html"      // 200 with a page in HTML
	Cut         Mood = "cut"       // the connection breaks in the middle of the body
	Slow        Mood = "slow"      // the answer takes APIConfig.Delay
	Short       Mood = "short"     // half of the page is missing
	TenOnly     Mood = "limit-10"  // limit is ignored: a page of ten
	CountLow    Mood = "count-low" // counts are a tenth too low, at least by one
	CountHigh   Mood = "count-high"
	NoID        Mood = "no-id" // the first object of the page has lost its id
	// SaysDeleted lets the last object of a page, or a single one that there is, say that it is deleted, as a webhook does.
	SaysDeleted Mood = "deleted"
)

// Moods lists all moods by name, sorted.
func Moods() []Mood {
	return []Mood{Limited, LimitedBare, LimitedDate, LimitedText, BadGateway, Unavailable, CountHigh, CountLow, Cut, SaysDeleted, Empty, Garbled, TenOnly, NoID, Redirect, Short, Slow}
}

// ParseMoods reads "429=0.05,slow=0.2,502"; a name alone is a rate of 1. It reports every mistake.
func ParseMoods(text string) (map[Mood]float64, error) {
	rates := map[Mood]float64{}
	var problems []error
	for part := range strings.SplitSeq(text, ",") {
		if part = strings.TrimSpace(part); part == "" {
			continue
		}
		name, value, given := strings.Cut(part, "=")
		mood, rate := Mood(strings.TrimSpace(name)), 1.0
		if !slices.Contains(Moods(), mood) {
			problems = append(problems, fmt.Errorf("mood %q: want one of %v", name, Moods()))
			continue
		}
		if given {
			parsed, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil || !(parsed >= 0 && parsed <= 1) {
				problems = append(problems, fmt.Errorf("mood %s: rate %q is not between 0 and 1", mood, value))
				continue
			}
			rate = parsed
		}
		rates[mood] = rate
	}
	return rates, errors.Join(problems...)
}

// mood decides how this request is answered: by the script while there is one, else by the rates.
func (a *API) mood() Mood {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.script) > 0 {
		mood := a.script[0]
		a.script = a.script[1:]
		return mood
	}
	for _, mood := range slices.Sorted(maps.Keys(a.rates)) {
		if rate := a.rates[mood]; rate > 0 && a.rng.Float64() < rate {
			return mood
		}
	}
	return ""
}

// SetMoods replaces the rates of the moods.
func (a *API) SetMoods(rates map[Mood]float64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.rates = maps.Clone(rates)
}

// Next scripts the moods of the next requests, one each; an empty one is an ordinary answer.
func (a *API) Next(moods ...Mood) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.script = append(a.script, moods...)
}

// Pending is how many scripted moods are left.
func (a *API) Pending() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.script)
}

const gatewayPage = "<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>\r\n<center><h1>502 Bad Gateway</h1></center>\r\n<hr><center>cloudflare</center>\r\n</body>\r\n</html>\r\n"

// spoil answers a request in a mood that leaves nothing of the real answer, and tells whether it did.
func (a *API) spoil(w http.ResponseWriter, mood Mood) bool {
	html := func(status int) {
		w.Header().Set("Content-Type", "text/html")
		w.WriteHeader(status)
		_, _ = w.Write([]byte(gatewayPage))
	}
	switch mood {
	case Limited, LimitedText, LimitedDate, LimitedBare:
		a.limited(w, mood, a.cfg.RetryAfter)
	case BadGateway:
		html(http.StatusBadGateway)
	case Unavailable:
		a.problem(w, http.StatusServiceUnavailable, "internal_clerk_error", "Oops, an unexpected error occurred", "There was an internal error on our servers.", "")
	case Redirect:
		w.WriteHeader(http.StatusNotModified)
	case Empty:
		w.WriteHeader(http.StatusOK)
	case Garbled:
		html(http.StatusOK)
	default:
		return false
	}
	return true
}
