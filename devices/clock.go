package devices

import (
	"fmt"
	"math"
	"sort"
)

// Never is the deadline of a timer that is not armed.
const Never int64 = math.MaxInt64

// MaxTimers bounds the timers of one machine.
const MaxTimers = 64

// Clock is the virtual time of one guest: nanoseconds since its first power-on. It
// moves only when the machine advances it, at a stop of the vCPU, to a sample that
// the machine took (or read from a log), and never back.
type Clock struct {
	now     int64
	horizon int64
	timers  []*Timer // in order of registration
	next    int64    // the earliest deadline
}

// NewClock returns a clock at time zero.
func NewClock() *Clock { return &Clock{next: Never} }

// Now returns the present virtual time in nanoseconds. While a timer's function runs
// it is that timer's deadline, not the time of the sample.
func (c *Clock) Now() int64 { return c.now }

// Horizon returns the time that the clock is being advanced to: a periodic device
// that finds several of its periods before the horizon may count them at once
// instead of firing for each.
func (c *Clock) Horizon() int64 { return c.horizon }

// Next returns the earliest deadline of all timers, or [Never].
func (c *Clock) Next() int64 { return c.next }

// Timer is a deadline of a device on the virtual clock.
type Timer struct {
	clock    *Clock
	name     string
	deadline int64
	fire     func()
}

// NewTimer adds a timer. The name must be unique: saved deadlines are matched by it.
// fire runs inside Advance, with Now() equal to the deadline; it may arm any timer,
// also for a time that has passed (it then fires within the same Advance).
// It panics on a duplicate name or more than [MaxTimers]: both are defects of the machine's construction.
func (c *Clock) NewTimer(name string, fire func()) *Timer {
	for _, t := range c.timers {
		if t.name == name {
			panic("devices: two timers named " + name)
		}
	}
	if len(c.timers) == MaxTimers {
		panic("devices: too many timers")
	}
	t := &Timer{clock: c, name: name, deadline: Never, fire: fire}
	c.timers = append(c.timers, t)
	return t
}

// Deadline returns the time the timer fires at, or [Never].
func (t *Timer) Deadline() int64 { return t.deadline }

// Arm sets the deadline. A deadline in the past fires at the next Advance.
func (t *Timer) Arm(deadline int64) {
	t.deadline = deadline
	t.clock.update()
}

// Disarm forgets the deadline.
func (t *Timer) Disarm() { t.Arm(Never) }

func (c *Clock) update() {
	c.next = Never
	for _, t := range c.timers {
		c.next = min(c.next, t.deadline)
	}
}

// Advance moves the clock to the sample `to` and fires every timer that falls due,
// in order of deadline, then of registration. A sample before the present time
// leaves the time as it is (and still fires what is overdue).
//
// A device that re-arms its timer must choose a deadline after Now, so that Advance
// ends; for a periodic one [NextPeriod] also keeps the number of firings small.
func (c *Clock) Advance(to int64) {
	to = max(to, c.now)
	c.horizon = to
	for c.next <= to {
		for _, t := range c.timers {
			if t.deadline == c.next {
				c.now = max(c.now, t.deadline)
				t.deadline = Never
				c.update()
				t.fire()
				break
			}
		}
	}
	c.now = to
}

// NextPeriod returns the next deadline of a periodic timer that fired at deadline:
// one period on, or, when several periods lie before the horizon, the first deadline
// after the horizon; skipped is how many were passed over. period must be positive.
func NextPeriod(deadline, period, horizon int64) (next, skipped int64) {
	next = deadline + period
	if next <= horizon {
		skipped = (horizon-next)/period + 1
		next += skipped * period
	}
	return next, skipped
}

// ClockState is the saved form of a [Clock]: the time and the armed timers by name,
// in ascending order of name.
type ClockState struct {
	Now    int64
	Timers []TimerState
}

// TimerState is one armed timer: its name and deadline in nanoseconds.
type TimerState struct {
	Name     string
	Deadline int64
}

// Save returns the clock's state.
func (c *Clock) Save() ClockState {
	s := ClockState{Now: c.now}
	for _, t := range c.timers {
		if t.deadline != Never {
			s.Timers = append(s.Timers, TimerState{t.name, t.deadline})
		}
	}
	sort.Slice(s.Timers, func(i, j int) bool { return s.Timers[i].Name < s.Timers[j].Name })
	return s
}

// Restore sets time and deadlines. Every saved timer must exist in this machine.
func (c *Clock) Restore(s ClockState) error {
	if s.Now < 0 {
		return fmt.Errorf("devices: saved time %d is negative", s.Now)
	}
	byName := make(map[string]*Timer, len(c.timers))
	for _, t := range c.timers {
		byName[t.name] = t
	}
	for i, ts := range s.Timers {
		if byName[ts.Name] == nil {
			return fmt.Errorf("devices: saved timer %q does not exist in this machine", ts.Name)
		}
		if i > 0 && s.Timers[i-1].Name >= ts.Name {
			return fmt.Errorf("devices: saved timers are not in order at %q", ts.Name)
		}
	}
	for _, t := range c.timers {
		t.deadline = Never
	}
	for _, ts := range s.Timers {
		byName[ts.Name].deadline = ts.Deadline
	}
	c.now, c.horizon = s.Now, s.Now
	c.update()
	return nil
}

// ScaleTime converts t nanoseconds to ticks of a clock of hz, in integers that do not
// overflow: floor(t*hz/1e9) for t >= 0 and hz up to 2^32.
func ScaleTime(t int64, hz uint64) uint64 {
	const second = 1_000_000_000
	s, ns := uint64(t)/second, uint64(t)%second
	return s*hz + ns*hz/second
}

// TicksToTime is the inverse of [ScaleTime], rounded up: the first nanosecond at
// which ScaleTime returns at least ticks.
func TicksToTime(ticks, hz uint64) int64 {
	const second = 1_000_000_000
	s, rest := ticks/hz, ticks%hz
	return int64(s*second + (rest*second+hz-1)/hz)
}
