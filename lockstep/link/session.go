package link

import (
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// drainTime is how long a log connection may still give up what has arrived when another
	// connection of its path has ended. A peer that was killed ends all of them at once.
	drainTime = 20 * time.Millisecond
	// byeTime bounds the writing of a goodbye, byeLead is how long before the connections are cut it goes out.
	byeTime = 100 * time.Millisecond
	byeLead = 5 * time.Millisecond
	// A class moves to a path that works as well only if it has been better for betterTicks heartbeats,
	// by a quarter and by betterMin.
	betterTicks = 16
	betterMin   = 50 * time.Microsecond
	// rttWeight is the weight of the old value in the mean of round trips, against 1 of the new.
	rttWeight = 7
)

var errClosed = refuse(Closed, "the link is closed")

// Peer is what the peer said in its hello.
type Peer struct {
	Side         Side
	Version      int    // the highest that both speak
	Capabilities uint64 // those of both
	Epoch, Term  uint64
}

// Session is one life of the link. Its methods may be called from any goroutine.
type Session struct {
	cfg      *Config
	nonce    nonce
	dialling bool
	base     time.Time // zero of the clock in heartbeats
	tx       [classes]*sender
	rx       [classes]*receiver
	started  chan struct{}
	starting sync.Once
	deliver  func(Class, []byte)
	up       chan struct{} // closed when the first path is there
	done     chan struct{} // closed when the session ends
	ended    func()        // the listener's
	wg       sync.WaitGroup

	mu        sync.Mutex
	other     nonce // the listening side's
	peer      Peer
	paths     [MaxPaths]*path
	half      [MaxPaths][control + 1]*conn // connections of paths that are not complete
	better    int                          // heartbeats for which the other path has been better for the log
	bye       *Error                       // what the peer's goodbye said
	err       *Error                       // why the session ended
	monitored bool
}

// path is one network's connections.
type path struct {
	index int
	conns [control + 1]*conn
	gone  chan struct{} // closed when the path is lost
	once  sync.Once
	wake  chan struct{} // tells the control writer of pong or ack
	pong  atomic.Uint64 // clock of the ping to be answered, 0 if none
	ack   atomic.Bool
	heard atomic.Int64 // when something came, in nanoseconds of Session.base
	rtt   atomic.Int64 // mean round trip in nanoseconds, 0 if not known
	quiet bool         // Session.mu
}

func newSession(cfg *Config, id nonce, dialling bool) *Session {
	s := &Session{cfg: cfg, nonce: id, dialling: dialling, base: time.Now(),
		started: make(chan struct{}), up: make(chan struct{}), done: make(chan struct{}), ended: func() {}}
	for c, limit := range [classes]int{Log: MaxLogMessage, Bulk: MaxBulkMessage} {
		s.tx[c] = newSender(limit, ringSize)
		s.rx[c] = &receiver{limit: limit, deliver: func(p []byte) { s.deliver(Class(c), p) }}
	}
	return s
}

// ID names the session; it is the same on both sides.
func (s *Session) ID() string { return hex.EncodeToString(s.nonce[:8]) }

// Peer returns what the peer said in its hello.
func (s *Session) Peer() Peer {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.peer
}

// Start begins to deliver messages. The messages of a class come in order, one at a time; p is valid
// during the call only. While a call lasts no other message of its class is taken, and in the end the peer's
// sender waits; it is no sign of death. A call that waits for something must also wait for Done, because
// Close waits for it.
func (s *Session) Start(deliver func(c Class, p []byte)) {
	s.starting.Do(func() {
		s.deliver = deliver
		close(s.started)
	})
}

// Send queues a message, and waits while the peer does not keep up. p is copied. An urgent message goes out at once,
// and all before it in its class; others wait up to a millisecond for company. It returns an
// error if the session is over or the message too large.
func (s *Session) Send(c Class, p []byte, urgent bool) error { return s.send(c, p, urgent, true) }

// TrySend is Send without the wait: it returns [ErrFull] when there is no room.
func (s *Session) TrySend(c Class, p []byte, urgent bool) error { return s.send(c, p, urgent, false) }

func (s *Session) send(c Class, p []byte, urgent, wait bool) error {
	if int(c) >= classes {
		return fmt.Errorf("link: no messages are sent in %v", c)
	}
	err := s.tx[c].append(p, urgent, wait)
	if errors.Is(err, errClosed) {
		return s.Err()
	}
	return err
}

// Pending returns how many bytes of a class the peer's application has not taken yet, headers included.
func (s *Session) Pending(c Class) int { return s.tx[c].pending() }

// Done is closed when the session ends.
func (s *Session) Done() <-chan struct{} { return s.done }

// Err returns why the session ended, nil if it has not. It is an [*Error].
func (s *Session) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		return nil
	}
	return s.err
}

// Close ends the session for good: when it returns, no message of it is being delivered, and none will ever be.
// The peer is told the reason if it can be reached, without waiting for it. What was sent and not taken yet may be lost. Close must not be
// called by the function that delivers messages. There is no EventDown for it.
func (s *Session) Close(reason string) {
	s.end(&Error{Reason: Closed, Err: fmt.Errorf("this side closed the link: %s", reason)}, reason)
	for _, r := range s.rx {
		r.close()
	}
}

// end makes the end known, once. bye is for the peer.
func (s *Session) end(err *Error, bye string) (first bool) {
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		return false
	}
	s.err = err
	for _, r := range s.rx {
		r.over.Store(true)
	}
	close(s.done)
	paths, half := s.paths, s.half
	s.paths, s.half = [MaxPaths]*path{}, [MaxPaths][control + 1]*conn{}
	s.mu.Unlock()
	for _, t := range s.tx {
		t.close()
	}
	for _, p := range paths {
		if p != nil {
			s.wg.Go(func() { p.leave(bye) })
		}
	}
	for _, h := range half {
		for _, c := range h {
			if c != nil {
				c.raw.Close()
			}
		}
	}
	s.ended()
	return true
}

// fail ends the session because of what the peer or the network did.
func (s *Session) fail(err *Error) {
	if s.end(err, string(err.Reason)) {
		s.cfg.emit(Event{Kind: EventDown, Session: s.ID(), Path: -1, Reason: err.Reason, Text: fmt.Sprintf("the link is down: %v", err)})
	}
}

// leave says goodbye on a path and cuts it.
func (p *path) leave(bye string) {
	c := p.conns[control]
	_ = c.raw.SetWriteDeadline(time.Now().Add(byeTime))
	if c.write(kindBye, []byte(clip(bye, maxBye))) == nil {
		time.Sleep(byeLead) // so that the peer reads why before it sees that
	}
	p.cut()
}

// cut ends the loops of a path.
func (p *path) cut() {
	p.once.Do(func() {
		close(p.gone)
		for _, c := range p.conns {
			c.raw.Close()
		}
	})
}

// Path is the state of one path.
type Path struct {
	Up    bool          `json:"up"`
	Quiet bool          `json:"quiet"` // nothing has been heard over it for half of Config.Suspect
	RTT   time.Duration `json:"rtt_ns"`
	Log   bool          `json:"log"` // the log goes over it
	Bulk  bool          `json:"bulk"`
}

// Paths returns the state of the paths.
func (s *Session) Paths() [MaxPaths]Path {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out [MaxPaths]Path
	for i, p := range s.paths {
		if p != nil {
			out[i] = Path{Up: true, Quiet: p.quiet, RTT: time.Duration(p.rtt.Load()), Log: s.tx[Log].path() == i, Bulk: s.tx[Bulk].path() == i}
		}
	}
	return out
}

// now is the clock of heartbeats: it never goes back.
func (s *Session) now() int64 { return int64(time.Since(s.base)) + 1 }

// place takes a connection whose peer has said hello. It reports false, and ends the connection, if
// the session is over.
func (s *Session) place(c *conn, class Class, index int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		c.raw.Close()
		return false
	}
	half := &s.half[index]
	if class == control {
		// The dialling side begins a path with its control connection: what was there before is of an
		// attempt that failed.
		for i, old := range half {
			if old != nil {
				old.raw.Close()
				half[i] = nil
			}
		}
	}
	if half[class] != nil {
		half[class].raw.Close()
	}
	half[class] = c
	return true
}

// ready says that both hellos of a connection have been exchanged. The last one completes a path, which is
// then used and returned; else the result is nil.
func (s *Session) ready(c *conn, index int) *path {
	s.mu.Lock()
	half := &s.half[index]
	c.ready = true
	for _, c := range half {
		if c == nil || !c.ready {
			s.mu.Unlock()
			return nil
		}
	}
	p := &path{index: index, conns: *half, gone: make(chan struct{}), wake: make(chan struct{}, 1)}
	*half = [control + 1]*conn{}
	if old := s.paths[index]; old != nil {
		old.cut() // the dialling side has given it up
	}
	moved := s.attach(p)
	s.mu.Unlock()
	s.cfg.emit(Event{Kind: EventPathUp, Session: s.ID(), Path: index, Text: fmt.Sprintf("path %d is up", index)})
	s.tell(moved)
	return p
}

// attach makes a complete path one of the session's. s.mu is held. It returns the classes that moved.
func (s *Session) attach(p *path) []Class {
	p.heard.Store(s.now())
	for _, c := range p.conns {
		_ = c.raw.SetDeadline(time.Time{})
	}
	s.paths[p.index] = p
	// A writer starts at the first unacknowledged byte when its class moves to it; if the class
	// is on a path of the same number that is no more, it has to move anew.
	for _, t := range s.tx {
		if t.path() == p.index {
			t.move(-1)
		}
	}
	moved := s.choose()
	for c := range Class(classes) {
		s.wg.Go(func() { s.read(p, c) })
		s.wg.Go(func() { s.write(p, c) })
	}
	s.wg.Go(func() { s.readControl(p) })
	s.wg.Go(func() { s.writeControl(p) })
	if !s.monitored {
		s.monitored = true
		close(s.up)
		s.wg.Go(s.monitor)
	}
	return moved
}

// lose gives a path up.
func (s *Session) lose(p *path, err *Error) {
	p.cut()
	s.mu.Lock()
	if s.paths[p.index] != p {
		s.mu.Unlock()
		return
	}
	s.paths[p.index] = nil
	left := 0
	for _, q := range s.paths {
		if q != nil {
			left++
		}
	}
	moved := s.choose()
	if s.bye != nil && left == 0 {
		err = s.bye
	}
	s.mu.Unlock()
	for _, t := range s.tx {
		t.wake()
	}
	s.cfg.emit(Event{Kind: EventPathLost, Session: s.ID(), Path: p.index, Reason: err.Reason, Text: fmt.Sprintf("path %d is lost: %v", p.index, err)})
	s.tell(moved)
	if left == 0 {
		s.fail(err)
	}
}

// loseSoon gives a path up when its log has been read to its end.
func (s *Session) loseSoon(p *path, err *Error) {
	wait := time.NewTimer(drainTime)
	defer wait.Stop()
	select {
	case <-wait.C:
		s.lose(p, err)
	case <-p.gone:
	}
}

// protest ends the session if err says that the peer broke the rules, else only the path.
func (s *Session) protest(p *path, err *Error) {
	switch err.Reason {
	case Garbage, Oversized, OutOfOrder, Unencrypted:
		s.fail(err)
	default:
		s.lose(p, err)
	}
}

// choose gives each class the path that suits it best. s.mu is held. It returns the classes that moved.
func (s *Session) choose() (moved []Class) {
	var best [classes]int
	current := s.tx[Log].path()
	best[Log] = current
	var usable []int
	for i, p := range s.paths {
		if p != nil && !p.quiet {
			usable = append(usable, i)
		}
	}
	if len(usable) == 0 {
		// Nothing is heard from anywhere: stay, if there is something to stay on.
		for i, p := range s.paths {
			if p != nil && (best[Log] < 0 || s.paths[best[Log]] == nil) {
				best[Log] = i
			}
		}
		if best[Log] >= 0 && s.paths[best[Log]] == nil {
			best[Log] = -1
		}
		best[Bulk] = best[Log]
	} else {
		fits := func(i int) bool { return i >= 0 && s.paths[i] != nil && !s.paths[i].quiet }
		if !fits(current) {
			best[Log] = usable[0]
			s.better = 0
		} else if len(usable) > 1 && s.isBetter(s.paths[1-current], s.paths[current]) {
			best[Log] = 1 - current
		}
		best[Bulk] = best[Log]
		if len(usable) > 1 {
			best[Bulk] = 1 - best[Log]
		}
	}
	for c, i := range best {
		if s.tx[c].move(i) {
			moved = append(moved, Class(c))
		}
	}
	return moved
}

// isBetter reports whether path q has had a clearly shorter round trip than p for long enough.
func (s *Session) isBetter(q, p *path) bool {
	a, b := q.rtt.Load(), p.rtt.Load()
	if a == 0 || b == 0 || a*4 > b*3 || b-a < int64(betterMin) {
		s.better = 0
		return false
	}
	if s.better++; s.better < betterTicks {
		return false
	}
	s.better = 0
	return true
}

// tell emits the events of moves.
func (s *Session) tell(moved []Class) {
	for _, c := range moved {
		if i := s.tx[c].path(); i >= 0 {
			s.cfg.emit(Event{Kind: EventMoved, Session: s.ID(), Path: i, Class: c, Text: fmt.Sprintf("%v goes over path %d", c, i)})
		}
	}
}

// read is the loop that takes one class's segments from one path.
func (s *Session) read(p *path, class Class) {
	c := p.conns[class]
	select {
	case <-s.started:
	case <-p.gone:
		return
	}
	for {
		h, payload, err := c.frames.next()
		if err == nil && h.kind != kindSegment {
			err = refuse(Garbage, "a frame of kind %d on the %v connection", h.kind, class)
		}
		tell := false
		if err == nil {
			p.heard.Store(s.now())
			tell, err = s.rx[class].segment(h, payload)
		}
		switch {
		case err == nil:
		case class == Log:
			s.protest(p, err)
			return
		default:
			s.protestSoon(p, err)
			return
		}
		if tell {
			p.ack.Store(true)
			p.nudge()
		}
	}
}

// protestSoon is protest for connections other than the log's.
func (s *Session) protestSoon(p *path, err *Error) {
	if err.Reason == Lost || err.Reason == Truncated || err.Reason == PeerClosed {
		s.loseSoon(p, err)
		return
	}
	s.protest(p, err)
}

// write is the loop that sends one class over one path, while the path is the class's.
func (s *Session) write(p *path, class Class) {
	c := p.conns[class]
	record := make([]byte, maxRecord)
	at := cursor{path: p.index}
	stop := func() bool {
		select {
		case <-p.gone:
			return true
		default:
			return false
		}
	}
	for {
		b := s.tx[class].next(&at, record, stop)
		if b == nil {
			return
		}
		if _, err := c.tls.Write(b); err != nil {
			s.loseSoon(p, refuse(Lost, "the connection broke: %w", err))
			return
		}
	}
}

func (p *path) nudge() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// readControl is the loop that takes heartbeats, acknowledgements and the peer's goodbye.
func (s *Session) readControl(p *path) {
	for {
		h, payload, err := p.conns[control].frames.next()
		if err != nil {
			s.protestSoon(p, err)
			return
		}
		p.heard.Store(s.now())
		if h.kind == kindBye {
			bye := refuse(PeerClosed, "the peer closed the link: %s", printable(payload))
			s.mu.Lock()
			s.bye = bye
			s.mu.Unlock()
			s.loseSoon(p, bye)
			return
		}
		if err := s.beat(p, h.kind, payload); err != nil {
			s.protest(p, err)
			return
		}
	}
}

// beat takes one frame of heartbeats and acknowledgements.
func (s *Session) beat(p *path, k kind, payload []byte) *Error {
	if k != kindPing && k != kindPong && k != kindAck {
		return refuse(Garbage, "a frame of kind %d on the control connection", k)
	}
	m, err := parseBeat(payload)
	if err != nil {
		return err
	}
	for c, t := range s.tx {
		if err := t.ack(m.taken[c]); err != nil {
			return err
		}
	}
	switch k {
	case kindPing:
		p.pong.Store(m.clock)
		p.nudge()
	case kindPong:
		// The clock is our own, if the peer is honest; a wrong one only makes a wrong mean.
		if rtt := s.now() - int64(m.clock); rtt > 0 && rtt < int64(time.Hour) {
			if old := p.rtt.Load(); old > 0 {
				rtt = (old*rttWeight + rtt) / (rttWeight + 1)
			}
			p.rtt.Store(rtt)
		}
	}
	return nil
}

// writeControl is the loop that sends heartbeats, their answers and acknowledgements.
func (s *Session) writeControl(p *path) {
	tick := time.NewTicker(s.cfg.Suspect / beatsPerSuspect)
	defer tick.Stop()
	var b [headerSize + beatSize]byte
	send := func(k kind, clock uint64) bool {
		m := beat{clock: clock}
		for c, r := range s.rx {
			m.taken[c] = r.taken.Load()
		}
		header{length: beatSize, kind: k}.put(b[:])
		m.put(b[headerSize:])
		if _, err := p.conns[control].tls.Write(b[:]); err != nil {
			s.loseSoon(p, refuse(Lost, "the connection broke: %w", err))
			return false
		}
		return true
	}
	if !send(kindPing, uint64(s.now())) {
		return
	}
	for {
		select {
		case <-p.gone:
			return
		case <-s.done: // leave says the last word
			return
		case <-tick.C:
			if !send(kindPing, uint64(s.now())) {
				return
			}
		case <-p.wake:
			acked := p.ack.Swap(false)
			if clock := p.pong.Swap(0); clock != 0 {
				if !send(kindPong, clock) {
					return
				}
			} else if acked && !send(kindAck, 0) {
				return
			}
		}
	}
}

// monitor is the loop that watches for silence and for better paths.
func (s *Session) monitor() {
	every := s.cfg.Suspect / beatsPerSuspect
	tick := time.NewTicker(every)
	defer tick.Stop()
	last := s.now()
	state := EventAlive
	for {
		select {
		case <-s.done:
			return
		case <-tick.C:
		}
		now := s.now()
		late := time.Duration(now-last) - every
		last = now
		if late > s.cfg.Suspect/2 {
			// This process was stopped or starved. The peer may have sent all the while: give the readers
			// until the next tick to find out.
			s.cfg.emit(Event{Kind: EventStarved, Session: s.ID(), Path: -1, Silence: late, Text: fmt.Sprintf("this process did not run for %v", late)})
			continue
		}
		silence := s.watch(now)
		was := state
		switch {
		case silence >= s.cfg.Dead:
			state = EventDead
		case silence >= s.cfg.Suspect:
			if state != EventDead {
				state = EventSuspect
			}
		default:
			state = EventAlive
		}
		if state != was {
			s.cfg.emit(Event{Kind: state, Session: s.ID(), Path: -1, Silence: silence, Text: fmt.Sprintf("the peer is %s, last heard %v ago", state, silence)})
		}
	}
}

// watch looks at all paths and returns for how long the peer has been silent.
func (s *Session) watch(now int64) time.Duration {
	s.mu.Lock()
	var (
		silence time.Duration = math.MaxInt64
		working               = false
		dead    *path
	)
	for _, p := range s.paths {
		if p == nil {
			continue
		}
		d := time.Duration(max(0, now-p.heard.Load()))
		p.quiet = d >= s.cfg.Suspect/2
		silence = min(silence, d)
		if d >= s.cfg.Dead {
			dead = p
		}
		working = working || !p.quiet
	}
	if silence == math.MaxInt64 {
		silence = 0 // no path: the session is about to end
	}
	moved := s.choose()
	s.mu.Unlock()
	s.tell(moved)
	if dead != nil && working {
		s.lose(dead, refuse(Silent, "nothing was heard over it for %v", s.cfg.Dead))
	}
	return silence
}
