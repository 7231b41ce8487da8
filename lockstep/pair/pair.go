package pair

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ftvmm/ftvmm/devices/virtio/blk"
	"github.com/ftvmm/ftvmm/devices/virtio/net"
	"github.com/ftvmm/ftvmm/lockstep/announce"
	"github.com/ftvmm/ftvmm/lockstep/arbiter"
	"github.com/ftvmm/ftvmm/lockstep/link"
	"github.com/ftvmm/ftvmm/lockstep/log"
	"github.com/ftvmm/ftvmm/lockstep/pages"
	"github.com/ftvmm/ftvmm/lockstep/protocol"
	"github.com/ftvmm/ftvmm/vmm"
)

// Limits and times of the shell.
const (
	// Tick is the length of a tick of the protocol.
	Tick = time.Millisecond
	// maxTicks bounds the ticks that are made up for at once: what a process that did not run has missed says
	// nothing about its peer.
	maxTicks = 20
	// DefaultInterval is the time between two cuts of the checkpoint engine.
	DefaultInterval = 10 * time.Millisecond
	// fragment is the most of a message that is sent at once, and maxMessage of all its fragments, in bytes.
	fragment   = 1 << 20
	maxMessage = protocol.MaxCut
	// maxInbox bounds the calls that wait for the shell; then those who make them wait.
	maxInbox = 1024
	// arbiterTimeout bounds a request to the arbiter.
	arbiterTimeout = 5 * time.Second
	// goodbye bounds the wait for the peer to hear that the guest has ended.
	goodbye = time.Second
	// redial is the time between two attempts to reach the peer.
	redial = 200 * time.Millisecond

	frameHeader = net.HeaderSize
)

// Options say how a side takes part in its pair.
type Options struct {
	Keys    *link.Keys
	Listen  []string // addresses to wait for the peer at, or
	Peer    []string // addresses to find it at; one a path
	Arbiter arbiter.Arbiter
	Commit  protocol.Commit
	// Taint says that the guest may read clocks that this host cannot trap, RDTSC above all: then each output
	// needs a cut.
	Taint bool
	// Interval is the time between two cuts of the checkpoint engine (Commit Checkpointed); 0: DefaultInterval.
	Interval time.Duration
	// ScrubPeriod is the time within which all memory and device state of the two sides is compared; 0: DefaultScrubPeriod.
	ScrubPeriod time.Duration
	// StaleMark is the path of a file that is there while this side's disks are not a whole copy; "" keeps no mark.
	StaleMark string
	// VerifyCuts has the backup compare all memory and state after each cut, while both guests stand: slow, for tests.
	VerifyCuts bool
	// Tune changes the protocol's bounds and times, for tests.
	Tune func(*protocol.Config)
	// Event is told what happens, from goroutines of the pair; it must not block. nil: nobody.
	Event func(name string, fields map[string]any)
	Log   *slog.Logger // nil discards
}

// ReplicaError reports that this side's disk did not do what the other side's did.
type ReplicaError struct {
	Disk           int
	Op             blk.Op
	Offset, Length uint64
	Here, There    blk.Status
}

func (e *ReplicaError) Error() string {
	return fmt.Sprintf("pair: disk %d: operation %d of %d bytes at %d ended with status %d here and %d on the other side", e.Disk, e.Op, e.Length, e.Offset, e.Here, e.There)
}

// Status is what a person wants to know of a side.
type Status struct {
	Side   string          `json:"side"`
	Phase  string          `json:"phase"`
	Live   bool            `json:"live"`
	Term   uint64          `json:"term"`
	Record protocol.Record `json:"record"`
	Linked bool            `json:"linked"`
	Held   int             `json:"outputs_held"`
	Cuts   uint64          `json:"cuts"`
	// LogBytes counts the messages that carried the log, as they were given to the link, and SentBytes those of all kinds.
	LogBytes  uint64      `json:"log_bytes"`
	SentBytes uint64      `json:"sent_bytes"`
	Paths     []link.Path `json:"paths,omitempty"`
}

// Pair is one side of a pair.
type Pair struct {
	opts  Options
	world *world
	m     *vmm.Machine
	cfg   *vmm.Config
	log   *slog.Logger

	inbox  chan func()
	kick   chan struct{}
	work   chan func()
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	err    atomic.Pointer[error]

	// Of the shell's goroutine.
	node     *protocol.Node
	identity []byte
	session  *link.Session
	conn     uint64
	up       bool // the node knows of the session
	out      *sender
	decoder  log.Decoder
	logging  bool
	lastCut  time.Time
	cuts     uint64
	logBytes uint64
	allBytes uint64
	ring     []event
	exitHeld bool
	since    time.Time // of the present phase
	staged   *staged
	buffer   *cutBuffer
	frames   []earlyFrame
	staging  bool // the guest's memory has been written by a pre-copy

	early earlySender

	gen atomic.Uint64 // of copies: one that is discarded belongs to an older one

	// Of the vCPU loop.
	dirty pages.Set // since the last cut, of what was taken from KVM
	// Of the worker.
	sums []pages.Sum
}

// New returns one side of a pair for the machine that will be made from cfg, which it changes: the machine's world is then
// seen through the pair. Start follows when the machine is made.
func New(cfg *vmm.Config, o Options) (*Pair, error) {
	switch {
	case o.Keys == nil:
		return nil, errors.New("pair: a side of a pair needs keys")
	case o.Arbiter == nil:
		return nil, errors.New("pair: a pair needs an arbiter")
	case (len(o.Listen) == 0) == (len(o.Peer) == 0):
		return nil, errors.New("pair: one side waits for its peer, the other finds it: say which, and where")
	}
	if o.Interval == 0 {
		o.Interval = DefaultInterval
	}
	if o.ScrubPeriod == 0 {
		o.ScrubPeriod = DefaultScrubPeriod
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	p := &Pair{
		opts: o, cfg: cfg, log: o.Log, inbox: make(chan func(), maxInbox), kick: make(chan struct{}, 1), work: make(chan func(), maxInbox),
		since: time.Now(),
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	w := &world{
		taint: o.Taint, offloads: map[int]vmm.Offloads{}, entropy: map[uint64]int{},
		checkpoint: o.Commit == protocol.Checkpointed,
	}
	w.wake = func() {
		select {
		case p.kick <- struct{}{}:
		default:
		}
	}
	w.failed = p.fail
	w.diverge = func(what string) {
		p.event("divergence-found", map[string]any{"what": what})
		p.showExits()
	}
	for _, n := range cfg.NICs {
		w.learner = append(w.learner, announce.New(n.MAC))
	}
	p.world = w
	cfg.DirtyLog = true
	inner, observe := cfg.Wrap, cfg.Observe
	var wrapErr error
	cfg.Wrap = func(in vmm.InputSource, out vmm.OutputSink) (vmm.InputSource, vmm.OutputSink) {
		if inner != nil {
			in, out = inner(in, out)
		}
		l, ok := in.(*vmm.Live)
		if !ok {
			wrapErr = errors.New("pair: the machine's source is not a live one")
			return in, out
		}
		w.in = l
		l.OnFrame(p.arrived)
		w.disks = newDisks(l.Disks())
		w.disks.complete = l.Complete
		w.disks.finished = func() { w.bell.Ring() }
		return w, w
	}
	cfg.Observe = func(e *vmm.ExitRecord) {
		if observe != nil {
			observe(e)
		}
		w.observe(e)
	}
	return p, wrapErr
}

// Start begins to look for the peer, with the machine m, which the caller then runs: its guest stands until this
// side has one. Close ends it.
func (p *Pair) Start(m *vmm.Machine) error {
	p.m, p.world.m = m, m
	p.world.scrub.plan(m, p.opts.ScrubPeriod)
	side := protocol.Side(p.opts.Keys.Side)
	cfg := protocol.DefaultConfig(side)
	cfg.Commit, cfg.Create, cfg.Incarnation = p.opts.Commit, side == protocol.A, random()
	cfg.Stale = p.isStale()
	if p.opts.Tune != nil {
		p.opts.Tune(&cfg)
	}
	p.node = protocol.New(cfg)
	var err error
	if p.identity, err = p.describe(); err != nil {
		return err
	}
	var listener *link.Listener
	if len(p.opts.Listen) > 0 {
		if listener, err = link.Listen(p.linkConfig(), p.opts.Listen...); err != nil {
			return err
		}
	}
	for _, f := range []func(){p.shell, p.worker, func() { p.meet(listener) }} {
		p.wg.Add(1)
		go func() {
			defer p.wg.Done()
			f()
		}()
	}
	return nil
}

// Close ends this side: for the other it is as if the host was gone. The machine has ended.
func (p *Pair) Close() error {
	if p.world.ended.Load() {
		p.sayGoodbye()
	}
	p.cancel()
	p.wg.Wait()
	if p.session != nil {
		p.session.Close("this side has ended")
	}
	if e := p.err.Load(); e != nil {
		return *e
	}
	return nil
}

// sayGoodbye waits until the peer has what was sent: that the guest has ended.
func (p *Pair) sayGoodbye() {
	ctx, cancel := context.WithTimeout(p.ctx, goodbye)
	defer cancel()
	for left := 1; left > 0 && ctx.Err() == nil; {
		if err := p.ask(ctx, func() {
			if left = 0; p.out != nil {
				left = p.out.pending()
			}
		}); err != nil {
			return
		}
		time.Sleep(Tick)
	}
}

// fail ends this side because it cannot go on. The other can.
func (p *Pair) fail(err error) {
	p.err.CompareAndSwap(nil, &err)
	p.event("side-failed", map[string]any{"error": err.Error()})
	p.m.Quit()
}

func random() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return binary.LittleEndian.Uint64(b[:])
}

func (p *Pair) event(name string, fields map[string]any) {
	p.log.Info(name, "fields", fields)
	if p.opts.Event != nil {
		p.opts.Event(name, fields)
	}
}

// post has the shell run f.
func (p *Pair) post(f func()) {
	select {
	case p.inbox <- f:
	case <-p.ctx.Done():
	}
}

// ask has the shell run f, and waits for it.
func (p *Pair) ask(ctx context.Context, f func()) error {
	done := make(chan struct{})
	p.post(func() { f(); close(done) })
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-p.ctx.Done():
		return vmm.ErrEnded
	}
}

// Status returns what this side is doing.
func (p *Pair) Status(ctx context.Context) (s Status, err error) {
	err = p.ask(ctx, func() {
		s = Status{
			Side: p.opts.Keys.Side.String(), Phase: p.node.Phase().String(), Live: p.node.Live(), Term: p.node.Term(), Record: p.node.Record(),
			Linked: p.up, Held: p.node.Held(), Cuts: p.cuts,
			LogBytes: p.logBytes, SentBytes: p.allBytes,
		}
		if p.session != nil {
			for _, path := range p.session.Paths() {
				s.Paths = append(s.Paths, path)
			}
		}
	})
	return s, err
}

// ErrNotNow reports an order that the side cannot carry out in its phase.
var ErrNotNow = errors.New("pair: not now")

// Live says whether this side's guest is the one that the world sees.
func (p *Pair) Live() bool { return p.world.is(live) }

// SwitchOver hands a protected guest over to the other side. It returns when that has begun; events tell how it ends.
func (p *Pair) SwitchOver(ctx context.Context) error {
	var ok bool
	var phase protocol.Phase
	if err := p.ask(ctx, func() { ok, phase = p.node.SwitchOver(), p.node.Phase() }); err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("%w: this side is %v; a primary whose pair is complete can hand over", ErrNotNow, phase)
	}
	return nil
}

// Force makes a waiting side live although the record does not allow it: what the other side had promised is lost.
func (p *Pair) Force(ctx context.Context) error {
	var ok bool
	var phase protocol.Phase
	if err := p.ask(ctx, func() { ok, phase = p.node.Force(), p.node.Phase() }); err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("%w: this side is %v, or has nothing to start from", ErrNotNow, phase)
	}
	return nil
}

// --- The shell ----------------------------------------------------------------------------------

func (p *Pair) shell() {
	ticker := time.NewTicker(Tick)
	defer ticker.Stop()
	began, ticks := time.Now(), int64(0)
	for {
		select {
		case f := <-p.inbox:
			f()
		case <-p.kick:
		case <-ticker.C:
			n := int64(time.Since(began)/Tick) - ticks
			if n > maxTicks {
				ticks += n - maxTicks
				n = maxTicks
			}
			ticks += n
			for range n {
				p.node.Tick()
			}
			p.tick()
		case <-p.ctx.Done():
			return
		}
		p.takeEvents()
		p.carryOut()
	}
}

// tick does what is due now and then.
func (p *Pair) tick() {
	if !p.node.Logging() {
		return
	}
	if p.opts.Commit != protocol.Checkpointed {
		p.world.disks.prune(p.node.Acked(), p.node.Term())
	} else if time.Since(p.lastCut) >= p.opts.Interval {
		p.node.NeedCut("checkpoint")
	}
}

// takeEvents tells the node what the vCPU loop has done.
func (p *Pair) takeEvents() {
	p.ring = p.world.events(p.ring)
	for i := range p.ring {
		switch e := &p.ring[i]; e.kind {
		case evLog:
			p.node.Log(e.point, e.data, e.flag)
		case evOutput:
			p.exitHeld = p.exitHeld || e.data[0] == outExit
			p.node.Output(e.point, e.data)
		case evMark:
			p.node.Mark(e.point, e.digest, e.flag)
		case evExecuted:
			p.node.Executed(e.point, e.digest, e.flag)
		case evDiverged:
			p.node.Diverged(e.point, e.digest)
		case evCall:
			switch {
			case e.call != nil:
				e.call()
			case e.flag:
				p.node.NeedCut("an input has waited")
			}
		}
	}
	clear(p.ring)
}

// carryOut does what the node wants.
func (p *Pair) carryOut() {
	for {
		actions := p.node.Ready()
		if len(actions) == 0 {
			break
		}
		for _, a := range actions {
			p.do(a)
		}
		p.node.Advance()
	}
	if was := p.logging; was != p.node.Logging() {
		p.logging = !was
		if was {
			p.world.logging.Store(false)
			p.world.disks.setTracking(trackNothing)
			p.buffer = nil
		}
	}
	if p.exitHeld && p.node.Held() == 0 {
		p.showEnd()
	}
}

// showEnd lets the machine end: the guest has, and everybody knows who must.
func (p *Pair) showEnd() {
	p.exitHeld = false
	p.world.ended.Store(true)
	p.world.bell.Ring()
}

// do carries out one action.
func (p *Pair) do(a protocol.Action) {
	w := p.world
	switch a := a.(type) {
	case protocol.Send:
		if a.Conn == p.conn && p.out != nil {
			n := uint64(p.out.send(&a.Message))
			p.allBytes += n
			if a.Message.Type == protocol.MsgLog {
				p.logBytes += n
			}
		}
	case protocol.CloseLink:
		if a.Conn == p.conn {
			p.hangUp("the protocol has given up on the peer")
		}
	case protocol.Ask:
		p.askArbiter(a.Request)
	case protocol.Release:
		for i := range a.Outputs {
			p.release(&a.Outputs[i])
		}
	case protocol.Boot:
		w.order(p.boot)
	case protocol.Freeze:
		p.onLoop(func() error {
			w.close()
			p.m.Freeze()
			w.tell(event{kind: evCall, call: func() { p.node.Frozen(false) }}, true)
			return nil
		})
	case protocol.Thaw:
		p.onLoop(func() error { p.m.Thaw(); return nil })
	case protocol.Pace:
		w.pace.Store(a.Wait)
		w.bell.Ring()
	case protocol.GoLive:
		newTerm, term, early := p.node.Logging(), p.node.Term(), p.unlogged()
		w.order(func() error { return p.goLive(newTerm, term, early) })
	case protocol.Follow:
		p.decoder = log.Decoder{}
		w.resetLog()
		p.onLoop(p.follow)
	case protocol.Feed:
		p.feed(a)
	case protocol.Verified:
		w.disks.verified(a.Point)
	case protocol.Prepare:
		p.prepare()
	case protocol.Precopy:
		p.precopy()
	case protocol.StageChunk:
		p.stageChunk(a.Data)
	case protocol.StopForCut:
		p.stopForCut()
	case protocol.TakeCut:
		p.takeCut(a)
	case protocol.Stage:
		p.stage(a.Data)
	case protocol.CollectPages:
		p.collect(a.Want)
	case protocol.StagePages:
		p.stagePages(a.Data)
	case protocol.Apply:
		p.apply()
	case protocol.Discard:
		p.discard()
	case protocol.Event:
		p.tellEvent(a)
	}
}

// onLoop has a live machine's loop run f.
func (p *Pair) onLoop(f func() error) {
	if !p.m.Go(f) {
		p.fail(errors.New("pair: the machine's command queue is full"))
	}
}

func (p *Pair) tellEvent(e protocol.Event) {
	fields := map[string]any{"text": e.Text, "phase": p.node.Phase().String(), "term": p.node.Term()}
	if e.Kind == protocol.EventPhase {
		now := time.Now()
		fields["after_ms"] = now.Sub(p.since).Milliseconds()
		p.since = now
	}
	p.event("pair-"+string(e.Kind), fields)
	if e.Kind == protocol.EventDivergence {
		p.showExits()
	}
}

// showExits writes the last exits to the log, on both sides of a divergence: the first whose digests differ is where
// they parted.
func (p *Pair) showExits() {
	for _, x := range p.world.recent.list() {
		p.log.Info("exit", "at", x)
	}
}

// release lets an output leave.
func (p *Pair) release(o *protocol.Output) {
	if len(o.Data) < 3 {
		return
	}
	device, data := int(binary.LittleEndian.Uint16(o.Data[1:])), o.Data[3:]
	switch o.Data[0] {
	case outFrame:
		if device < len(p.cfg.NICs) && len(data) >= frameHeader {
			p.world.in.Frame(device, data)
		}
	case outConsole:
		if device <= len(p.cfg.Serial) {
			p.world.in.Console(device, data)
		}
	case outExit:
		p.showEnd()
	}
}

// askArbiter asks beside the shell; the answer comes when it comes.
func (p *Pair) askArbiter(r protocol.Request) {
	p.wg.Add(1)
	go func() {
		defer p.wg.Done()
		ctx, cancel := context.WithTimeout(p.ctx, arbiterTimeout)
		defer cancel()
		a, err := arbiter.Serve(ctx, p.opts.Arbiter, r)
		if err != nil {
			p.log.Warn("arbiter", "request", r.String(), "err", err)
			return
		}
		p.post(func() { p.node.Answer(a) })
	}()
}

// --- The link -----------------------------------------------------------------------------------

func (p *Pair) linkConfig() link.Config {
	return link.Config{Keys: p.opts.Keys, Log: p.log, Event: func(e link.Event) {
		p.event("link-"+string(e.Kind), map[string]any{"path": e.Path, "reason": string(e.Reason), "text": e.Text})
	}}
}

// meet finds the peer, again and again.
func (p *Pair) meet(l *link.Listener) {
	if l != nil {
		defer l.Close()
	}
	for p.ctx.Err() == nil {
		var s *link.Session
		var err error
		if l != nil {
			s, err = l.Accept(p.ctx)
		} else {
			s, err = link.Dial(p.ctx, p.linkConfig(), p.opts.Peer...)
		}
		if err != nil {
			p.log.Debug("no link", "err", err)
			select {
			case <-time.After(redial):
			case <-p.ctx.Done():
			}
			continue
		}
		p.post(func() { p.begin(s) })
		if l == nil {
			select {
			case <-s.Done():
			case <-p.ctx.Done():
			}
		}
	}
}

// Kinds of frame on the link: what its first byte says.
const (
	frameLast     = iota // a message of the protocol, or its last fragment
	frameMore            // a fragment; more follow
	frameIdentity        // what guest this side is for
	frameEarly           // a frame for the guest that the log does not have yet
)

// begin begins a session.
func (p *Pair) begin(s *link.Session) {
	p.hangUp("a new session replaces this one")
	p.conn++
	conn := p.conn
	p.session, p.out = s, newSender(s)
	p.early.out.Store(p.out)
	var parts []byte
	s.Start(func(_ link.Class, b []byte) {
		if len(b) == 0 {
			return
		}
		var f func()
		switch b[0] {
		case frameMore:
			if parts = append(parts, b[1:]...); len(parts) > maxMessage {
				f = func() { p.violation(conn, fmt.Errorf("a message of more than %d bytes", maxMessage)) }
			}
		case frameLast:
			whole := append(parts, b[1:]...)
			parts = nil
			m, err := protocol.DecodeMessage(whole)
			f = func() {
				if err != nil {
					p.violation(conn, err)
				} else if conn == p.conn {
					if m.Type == protocol.MsgCutAck {
						p.log.Debug("cut acknowledged", "us", time.Since(p.lastCut).Microseconds())
					}
					p.node.Step(conn, m)
				}
			}
		case frameIdentity:
			theirs := append([]byte(nil), b[1:]...)
			f = func() { p.compare(conn, theirs) }
		case frameEarly:
			early := append([]byte(nil), b[1:]...)
			f = func() {
				if conn == p.conn && !p.node.Live() {
					p.keepFrame(early)
				}
			}
		default:
			f = func() { p.violation(conn, fmt.Errorf("a frame of kind %d", b[0])) }
		}
		if f == nil {
			return
		}
		select {
		case p.inbox <- f:
		case <-s.Done():
		case <-p.ctx.Done():
		}
	})
	p.out.raw(append([]byte{frameIdentity}, p.identity...))
	go func() {
		<-s.Done()
		p.post(func() {
			if conn == p.conn {
				p.hangUp("")
			}
		})
	}()
}

// hangUp closes the session, and tells the node if it does not know.
func (p *Pair) hangUp(why string) {
	if p.session == nil {
		return
	}
	p.out.close()
	p.session.Close(why)
	p.session, p.out = nil, nil
	p.early.out.Store(nil)
	conn, up := p.conn, p.up
	p.up = false
	p.conn++ // nothing that is still on its way counts
	if p.world.is(following) {
		// The primary logs nothing more: what comes from now on this side alone may have.
		p.world.in.Hold()
	}
	if up && !p.world.ended.Load() { // a guest that has ended needs nobody to go on
		p.node.LinkDown(conn)
	}
}

func (p *Pair) violation(conn uint64, err error) {
	if conn != p.conn {
		return
	}
	p.event("pair-protocol", map[string]any{"text": err.Error()})
	p.hangUp("the peer breaks the protocol")
}

// identity is what both sides must agree in.
type identity struct {
	Format int // of this and of messages
	Name   string
	Commit string
	Taint  bool
	Memory string
	Device []string
	CPUID  string
	Disks  []string
	NICs   []string
}

// describe returns this side's identity.
func (p *Pair) describe() ([]byte, error) {
	f := p.m.Fingerprint()
	id := identity{
		Format: 1, Name: p.cfg.Name, Commit: p.opts.Commit.String(), Taint: p.opts.Taint, Memory: fmt.Sprint(f.Memory), Device: f.Devices,
		CPUID: fmt.Sprint(f.CPUID),
	}
	for _, d := range p.cfg.Disks {
		i := d.Backend.Info()
		id.Disks = append(id.Disks, fmt.Sprintf("%d bytes, block size %d, read-only %v, discard %v, id %q", i.Size, i.BlockSize, i.ReadOnly, i.Discard, i.ID))
	}
	for _, n := range p.cfg.NICs {
		id.NICs = append(id.NICs, fmt.Sprintf("%x", n.MAC))
	}
	return json.Marshal(id)
}

// compare looks at the peer's identity. A peer with another guest is refused.
func (p *Pair) compare(conn uint64, theirs []byte) {
	if conn != p.conn || p.up {
		return
	}
	if bytes.Equal(theirs, p.identity) {
		p.up = true
		p.node.LinkUp(conn)
		return
	}
	var a, b map[string]any
	_ = json.Unmarshal(p.identity, &a)
	if err := json.Unmarshal(theirs, &b); err != nil {
		p.violation(conn, err)
		return
	}
	for _, k := range []string{"Format", "Name", "Commit", "Taint", "Memory", "Device", "CPUID", "Disks", "NICs"} {
		if x, y := fmt.Sprint(a[k]), fmt.Sprint(b[k]); x != y {
			p.event("pair-mismatch", map[string]any{"what": k, "here": x, "there": y})
			break
		}
	}
	p.hangUp("the sides have different guests")
}

// sender sends a session's messages in order without making the shell wait.
type sender struct {
	s      *link.Session
	mu     sync.Mutex
	more   sync.Cond
	queue  [][]byte
	bytes  int
	closed bool
	buf    []byte
}

func newSender(s *link.Session) *sender {
	o := &sender{s: s}
	o.more.L = &o.mu
	go o.run()
	return o
}

// send encodes and sends a message, and returns how many bytes that took.
func (o *sender) send(m *protocol.Message) (size int) {
	for _, part := range m.Split(fragment) {
		o.buf = part.Append(append(o.buf[:0], frameLast))
		b := o.buf
		size += len(b)
		for len(b) > fragment {
			piece := append(make([]byte, 0, fragment), b[:fragment]...)
			piece[0] = frameMore
			o.raw(piece)
			b = b[fragment-1:] // its first byte is the next piece's kind
			b[0] = frameLast
		}
		o.raw(b)
	}
	return size
}

// raw sends a frame, of which it keeps nothing.
func (o *sender) raw(b []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.queue) == 0 && o.bytes == 0 && o.s.TrySend(link.Log, b, true) == nil {
		return
	}
	o.queue = append(o.queue, append([]byte(nil), b...))
	o.bytes += len(b)
	o.more.Signal()
}

// pending returns how many bytes the peer has not taken.
func (o *sender) pending() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.bytes + o.s.Pending(link.Log)
}

func (o *sender) close() {
	o.mu.Lock()
	o.closed = true
	o.more.Signal()
	o.mu.Unlock()
}

// run sends what had no room.
func (o *sender) run() {
	for {
		o.mu.Lock()
		for len(o.queue) == 0 && !o.closed {
			o.more.Wait()
		}
		if o.closed {
			o.mu.Unlock()
			return
		}
		b := o.queue[0]
		o.queue = o.queue[1:]
		o.mu.Unlock()
		err := o.s.Send(link.Log, b, true)
		o.mu.Lock()
		o.bytes -= len(b)
		o.mu.Unlock()
		if err != nil {
			return
		}
	}
}
