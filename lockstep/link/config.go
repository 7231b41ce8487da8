package link

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"
)

// Defaults and bounds of [Config].
const (
	DefaultSuspect          = 100 * time.Millisecond
	DefaultDead             = 300 * time.Millisecond
	DefaultHandshakeTimeout = 5 * time.Second
	// beatsPerSuspect is how many heartbeats go out in the time after which silence is suspect.
	beatsPerSuspect = 5
)

// Config says how a side takes part in its pair. Keys is required.
type Config struct {
	Keys *Keys
	// State returns what hello says of this side, for the protocol above. Nil says zeros.
	State func() (epoch, term uint64)
	// Capabilities are bits that this side offers; [Peer] has those that both do.
	Capabilities uint64
	// Suspect and Dead are how long the peer may be silent before the events of these names.
	Suspect, Dead time.Duration
	// HandshakeTimeout bounds the time from a TCP connection to its hello.
	HandshakeTimeout time.Duration
	// Event is told what happens, one call at a time, from goroutines of the link. It must not wait
	// for the link; it may call Close.
	Event func(Event)
	// Log takes the same for people. Nil discards.
	Log *slog.Logger
	// Dial makes TCP connections; nil takes a [net.Dialer].
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Now is the clock that certificates are checked with; nil takes time.Now.
	Now func() time.Time

	versions [2]uint16 // zero for MinVersion to MaxVersion
	tls      *tls.Config
	events   *sync.Mutex
}

// complete returns the configuration with its defaults.
func (c Config) complete() (*Config, error) {
	if c.Keys == nil {
		return nil, errors.New("link: no keys")
	}
	if c.Suspect == 0 {
		c.Suspect = DefaultSuspect
	}
	if c.Dead == 0 {
		c.Dead = DefaultDead
	}
	if c.Suspect < time.Millisecond || c.Dead < c.Suspect {
		return nil, fmt.Errorf("link: suspect after %v, dead after %v: they must be a millisecond or more, and in this order", c.Suspect, c.Dead)
	}
	if c.HandshakeTimeout == 0 {
		c.HandshakeTimeout = DefaultHandshakeTimeout
	}
	if c.State == nil {
		c.State = func() (uint64, uint64) { return 0, 0 }
	}
	if c.Event == nil {
		c.Event = func(Event) {}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Dial == nil {
		c.Dial = new(net.Dialer).DialContext
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.versions == [2]uint16{} {
		c.versions = [2]uint16{MinVersion, MaxVersion}
	}
	c.tls = c.Keys.config(c.Now)
	c.events = new(sync.Mutex)
	return &c, nil
}

// EventKind is what an event is about. The values are stable.
type EventKind string

// The events.
const (
	EventRefused  EventKind = "refused"   // a connection was refused, by this side or the peer
	EventPathUp   EventKind = "path-up"   // a path is usable
	EventPathLost EventKind = "path-lost" // a path is no longer usable
	EventMoved    EventKind = "moved"     // a class has moved to another path
	EventSuspect  EventKind = "suspect"   // nothing heard from the peer for Config.Suspect
	EventDead     EventKind = "dead"      // nothing heard from the peer for Config.Dead
	EventAlive    EventKind = "alive"     // heard from again after suspect
	EventStarved  EventKind = "starved"   // this process did not run; silence in that time means nothing
	EventDown     EventKind = "down"      // the session is over, and not by this side's Close
)

// Event is something that happened.
type Event struct {
	Kind EventKind
	// Session is the session's [Session.ID], "" for a refused connection.
	Session string
	// Path counts from 0; -1 where it does not apply.
	Path int
	// Class is the class that moved.
	Class Class
	// Reason is why, of refused, path-lost and down.
	Reason Reason
	// Silence is for how long nothing was heard, or the process did not run.
	Silence time.Duration
	Text    string
}

func (c *Config) emit(e Event) {
	level := slog.LevelInfo
	switch e.Kind {
	case EventRefused, EventPathLost, EventSuspect, EventDead, EventStarved, EventDown:
		level = slog.LevelWarn
	}
	c.Log.Log(context.Background(), level, "link: "+e.Text, "event", e.Kind, "session", e.Session, "path", e.Path, "reason", e.Reason)
	c.events.Lock()
	defer c.events.Unlock()
	c.Event(e)
}

// refused tells of a connection that came to nothing.
func (c *Config) refused(who string, err *Error) {
	c.emit(Event{Kind: EventRefused, Path: -1, Reason: err.Reason, Text: fmt.Sprintf("no connection with %s: %v", who, err)})
}
