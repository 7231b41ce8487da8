package record

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/ftvmm/ftvmm/devices"
	"github.com/ftvmm/ftvmm/devices/virtio/blk"
	"github.com/ftvmm/ftvmm/devices/virtio/net"
	"github.com/ftvmm/ftvmm/lockstep/log"
	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// Limits of a replayer.
const (
	// maxUnit bounds the entries between two marks.
	maxUnit = 1 << 20
	// maxJump bounds a step of time in nanoseconds: devices count their periods in it. In a recording the PM
	// timer makes steps of seconds.
	maxJump = int64(24 * time.Hour)
)

// ReplayOptions choose how a log is played.
type ReplayOptions struct {
	// Until is the position to stop at, when it has been dealt with; nil: the log's end.
	Until *vmm.Position
	// Verify compares the guest with the recorded one at every exit.
	Verify bool
	// Output gets what the guest writes to its consoles, the serial ports first; nil discards it.
	Output func(console int, p []byte)
	// Debug gets what it writes to the firmware's debug port.
	Debug func(p []byte)
	// KVM is the path of the KVM device, "" for the usual one.
	KVM string
}

// Divergence is the first difference between a replayed guest and its recording.
type Divergence struct {
	Position vmm.Position
	What     string // differs
	Recorded string // on the recorded side
	Replayed string // on this side
}

// Error describes the difference.
func (d *Divergence) Error() string {
	return fmt.Sprintf("the guest diverges from its recording at %v: %s\n  recorded: %s\n  replayed: %s", d.Position, d.What, d.Recorded, d.Replayed)
}

// Result is how a replay ended.
type Result struct {
	// Exit is how the machine ended; ExitQuit stands for the log's end or ReplayOptions.Until.
	Exit vmm.Exit
	// Position is the last that was dealt with.
	Position vmm.Position
	// Recorded is how the recorded guest ended; its Reason is empty if the log ends before.
	Recorded vmm.Exit
	// Verified is the last exit at which both sides were compared and equal, with Verify.
	Verified uint64
	// Digest is the guest's at the end, with Verify.
	Digest string
	// Divergence is the first difference, nil if there is none.
	Divergence *Divergence
}

// Replayer is the source and sink of a machine that repeats a recorded run.
type Replayer struct {
	opts  ReplayOptions
	log   *log.Reader
	setup *log.Setup
	m     *vmm.Machine
	bell  *vmm.Bell

	// queue holds the entries of one unit, up to a mark, from head on; ahead those of the next.
	queue, ahead unit
	head         int
	cut          error // why the log ends early

	track    tracker
	last     vmm.Position
	time     int64
	recorded vmm.Exit
	verified uint64
	found    *Divergence
	ended    bool // the log is at its end, or Until is reached
	pending  map[request]*vmm.DiskRequest
	entropy  map[uint64]int

	// The last exits of this side, for the report.
	recent [8]struct {
		r    vmm.ExitRecord
		regs kvm.Regs
	}
	nrecent int
}

// unit is what lies between two marks. The mark promises that nothing is missing.
type unit struct {
	entries []log.Entry
	mark    *log.Entry // nil: the log has ended
	first   uint64     // the exit of the mark's first check
}

// NewReplayer makes the machine that was recorded, ready to run. The caller closes the replayer, then the log.
func NewReplayer(l *log.Reader, opts ReplayOptions) (*Replayer, error) {
	r := &Replayer{
		opts: opts, log: l, setup: l.Setup, pending: map[request]*vmm.DiskRequest{}, entropy: map[uint64]int{},
		last: l.Setup.Start,
	}
	r.track.over, r.track.exit, r.verified = r.over, l.Setup.Start.Exit, l.Setup.Start.Exit
	r.load()
	r.advance()
	cfg, err := l.Setup.Config(l.Blobs, opts.KVM)
	if err != nil {
		return nil, err
	}
	cfg.Source, cfg.Sink, cfg.DebugConsole = r, r, opts.Debug
	if opts.Verify {
		cfg.Observe = r.observe
	}
	if r.m, err = vmm.New(cfg); err != nil {
		return nil, err
	}
	if err := r.m.Fingerprint().Match(l.Setup.Machine); err != nil {
		r.Close()
		return nil, fmt.Errorf("this host cannot run the recorded machine: %w", err)
	}
	if l.Setup.State {
		if err := r.restore(); err != nil {
			r.Close()
			return nil, err
		}
	}
	return r, nil
}

// restore brings the machine to the state that the recording begins with.
func (r *Replayer) restore() (err error) {
	f, err := os.CreateTemp("", "ftvmm-replay-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(f.Name())) }()
	if err := r.log.WriteState(f); err != nil {
		return err
	}
	return r.m.ReadState(f)
}

// Machine returns the machine: the caller runs it, and may look at it when it has ended.
func (r *Replayer) Machine() *vmm.Machine { return r.m }

// Close frees the machine.
func (r *Replayer) Close() error { return r.m.Close() }

// Finish tells how the replay went, given what Machine.Run returned. The error is about this host or the
// log; a guest that went its own way is in the result.
func (r *Replayer) Finish(end vmm.Exit, err error) (Result, error) {
	if errors.Is(err, vmm.ErrLanding) {
		r.diverge(r.last, "an asynchronous stop is not reached", r.expected(), err.Error())
		err = nil
	}
	if err != nil {
		return Result{}, err
	}
	r.compareHere()
	if e := r.peek(); r.queue.mark != nil && r.queue.mark.Kind == log.Closed && (e == nil || e.Pos.Exit > r.track.exit) {
		r.over(r.track.exit) // the last exit is complete
	}
	if r.found == nil && !r.ended && end.Reason != vmm.ExitQuit {
		r.finishRecorded(end)
	}
	res := Result{
		Exit: end, Position: r.last, Recorded: r.recorded, Verified: r.verified, Divergence: r.found,
	}
	if r.opts.Verify {
		res.Digest = r.track.Sum().String()
	}
	return res, r.cut
}

// finishRecorded compares how both guests have ended.
func (r *Replayer) finishRecorded(end vmm.Exit) {
	if r.queue.mark != nil {
		r.diverge(r.last, "the guest has ended", r.expected(), string(end.Reason))
		return
	}
	if r.recorded.Reason != end.Reason || r.recorded.Code != end.Code {
		r.diverge(r.last, "the guest's end", fmt.Sprintf("%s %d", r.recorded.Reason, r.recorded.Code), fmt.Sprintf("%s %d", end.Reason, end.Code))
	}
}

// diverge notes the first difference. The machine ends at the next stop.
func (r *Replayer) diverge(pos vmm.Position, what, recorded, replayed string) {
	if r.found == nil {
		r.found = &Divergence{pos, what, recorded, replayed}
		r.m.Quit() // it may make no more exits
	}
}

// load reads the unit after the present one.
func (r *Replayer) load() {
	r.ahead = unit{}
	if r.cut != nil {
		return
	}
	for {
		var e log.Entry
		if err := r.log.Next(&e); err != nil {
			// What comes after the last mark may be incomplete.
			r.ahead.entries = nil
			if !errors.Is(err, io.EOF) {
				r.cut = err
			}
			return
		}
		switch e.Kind {
		case log.End:
			r.recorded = e.End
			continue
		case log.Closed, log.Here:
			last := e.Pos.Exit + 1 // after the last exit with a check
			if e.Kind == log.Here {
				last--
			}
			if uint64(len(e.Checks)) > last {
				r.cut = fmt.Errorf("%w: %d checks up to exit %d", log.ErrFormat, len(e.Checks), e.Pos.Exit)
				r.ahead = unit{}
				return
			}
			r.ahead.mark, r.ahead.first = &e, last-uint64(len(e.Checks))
			return
		case log.Record:
			if !r.opts.Verify {
				continue
			}
		}
		if len(r.ahead.entries) == maxUnit {
			r.cut = fmt.Errorf("%w: more than %d entries without a mark", log.ErrFormat, maxUnit)
			r.ahead = unit{}
			return
		}
		r.ahead.entries = append(r.ahead.entries, e)
	}
}

// advance makes the next unit the present one.
func (r *Replayer) advance() {
	r.queue, r.head = r.ahead, 0
	if r.queue.mark != nil {
		r.load()
	}
}

// peek returns the next entry, nil at the end of the unit that the guest is in. Units are changed by over and
// compareHere alone, so that their marks are compared.
func (r *Replayer) peek() *log.Entry {
	if r.head < len(r.queue.entries) {
		return &r.queue.entries[r.head]
	}
	return nil
}

// expected says what the log has next.
func (r *Replayer) expected() string {
	e := r.peek()
	if e == nil && len(r.ahead.entries) > 0 {
		e = &r.ahead.entries[0]
	}
	if e == nil {
		return "nothing more"
	}
	switch e.Kind {
	case log.Sample:
		return fmt.Sprintf("a reading of the clock at %v", e.Pos)
	case log.Stop:
		return fmt.Sprintf("a stop at %v, rip %#x", e.Pos, e.Stop.RIP)
	case log.Record:
		return fmt.Sprintf("%v: %s", e.Pos, describe(&e.Exit, &e.Regs))
	}
	return fmt.Sprintf("an input (kind %d) at %v", e.Input.Kind, e.Pos)
}

// over compares an exit that is over with the recorded one.
func (r *Replayer) over(exit uint64) {
	q := &r.queue
	if q.mark == nil || r.found != nil {
		return
	}
	r.compareHere() // the guest has gone on
	if q.mark == nil || r.found != nil {
		return
	}
	if e := r.peek(); e != nil && e.Pos.Exit <= exit || q.mark.Kind == log.Here && q.mark.Pos.Exit <= exit {
		r.diverge(vmm.Position{Exit: exit}, "the guest goes on", r.expected(), "the next exit: "+r.latest(exit+1))
		return
	}
	sum := r.track.Sum()
	if r.opts.Verify && exit >= q.first && exit-q.first < uint64(len(q.mark.Checks)) {
		if want, got := q.mark.Checks[exit-q.first], log.Check(sum); want != got {
			r.diverge(vmm.Position{Exit: exit}, "what the guest has done up to this exit", fmt.Sprintf("check %#02x", want),
				fmt.Sprintf("check %#02x: %s", got, r.latest(exit)))
			return
		}
		r.verified = exit
	}
	if q.mark.Kind == log.Closed && exit >= q.mark.Pos.Exit {
		if r.opts.Verify && sum != q.mark.Sum {
			r.diverge(vmm.Position{Exit: exit}, "the digest of all up to this exit", q.mark.Sum.String(), sum.String()+": "+r.latest(exit))
			return
		}
		r.advance()
	}
}

// compareHere compares the digest at a mark within an exit that the guest has passed.
func (r *Replayer) compareHere() {
	for r.found == nil && r.queue.mark != nil && r.queue.mark.Kind == log.Here && r.peek() == nil && !log.Before(r.last, r.queue.mark.Pos) {
		if sum := r.track.Sum(); r.opts.Verify && sum != r.queue.mark.Sum {
			r.diverge(r.queue.mark.Pos, "the digest of all up to this position", r.queue.mark.Sum.String(), sum.String())
			return
		}
		r.advance()
	}
}

// latest describes what this side did last at an exit.
func (r *Replayer) latest(exit uint64) string {
	for i := range min(r.nrecent, len(r.recent)) {
		k := &r.recent[(r.nrecent-1-i)%len(r.recent)]
		if k.r.Pos.Exit == exit {
			return describe(&k.r, &k.regs)
		}
	}
	return fmt.Sprintf("exit %d", exit)
}

// arrive is called first at each stop.
func (r *Replayer) arrive(pos vmm.Position) {
	if log.Before(r.last, pos) {
		r.compareHere()
	}
	r.track.enter(pos.Exit)
	r.last = pos
}

// Attach implements [vmm.InputSource].
func (r *Replayer) Attach(bell *vmm.Bell) { r.bell = bell }

// Take returns the inputs that the log has for this position.
func (r *Replayer) Take(pos vmm.Position, _ int64, buf []vmm.Input) []vmm.Input {
	r.arrive(pos)
	for r.found == nil {
		e := r.peek()
		if e == nil || e.Kind != log.Input || e.Pos != pos {
			break
		}
		r.head++
		if !r.accept(e) {
			break
		}
		buf = append(buf, e.Input)
	}
	if r.found == nil {
		if e := r.peek(); e != nil && log.Before(e.Pos, pos) {
			r.diverge(pos, "the guest goes on", r.expected(), r.latest(pos.Exit))
		}
	}
	if r.queue.mark == nil && r.endsItself() {
		r.diverge(pos, "the guest goes on", fmt.Sprintf("it has ended: %s %d", r.recorded.Reason, r.recorded.Code), "it has not")
	}
	if r.finished(pos) {
		r.ended = true
	}
	if r.ended || r.found != nil {
		buf = append(buf, vmm.Input{Kind: vmm.InputStop})
	}
	return buf
}

// finished says whether pos is the last position to play.
func (r *Replayer) finished(pos vmm.Position) bool {
	if r.opts.Until != nil && !log.Before(pos, *r.opts.Until) {
		return true
	}
	if r.ahead.mark != nil || r.endsItself() {
		return false
	}
	mark := r.queue.mark
	if mark == nil {
		return true
	}
	// What is left of the unit may belong to this position: the clock, and the exit's record.
	if n := len(r.queue.entries); r.head < n && log.Before(pos, r.queue.entries[n-1].Pos) {
		return false
	}
	return !log.Before(pos, mark.Pos) || mark.Kind == log.Closed && pos.Exit >= mark.Pos.Exit
}

// endsItself says whether the recorded guest has ended itself, as this one will.
func (r *Replayer) endsItself() bool {
	return r.cut == nil && r.recorded.Reason != "" && r.recorded.Reason != vmm.ExitQuit
}

// accept checks an input of the log, which may be anybody's, and completes it.
func (r *Replayer) accept(e *log.Entry) bool {
	in := &e.Input
	bad := func(recorded, replayed string) bool {
		r.diverge(e.Pos, "an input that this guest cannot take", recorded, replayed)
		return false
	}
	switch in.Kind {
	case vmm.InputTime:
		if in.Time > r.time+maxJump {
			return bad(fmt.Sprintf("the time jumps to %d ns", in.Time), fmt.Sprintf("it is %d ns", r.time))
		}
		in.Time = r.advanceTime(in.Time)
	case vmm.InputDisk:
		key := request{int(in.Device), in.Tag}
		q := r.pending[key]
		if q == nil {
			return bad(fmt.Sprintf("request %d of disk %d is complete", in.Tag, in.Device), "there is no such request")
		}
		delete(r.pending, key)
		data := in.Data
		if q.Op == blk.Read && blk.Status(in.Status) == blk.StatusOK {
			if len(data) != len(q.Data) {
				return bad(fmt.Sprintf("a read of %d bytes", len(data)), fmt.Sprintf("a read of %d bytes", len(q.Data)))
			}
			copy(q.Data, data)
		} else if len(data) != 0 {
			return bad(fmt.Sprintf("a read of %d bytes", len(data)), "no read")
		} else {
			data = nil
		}
		r.track.Read(key.disk, key.tag, in.Status, data)
		in.Data = nil
	case vmm.InputFrame:
		if int(in.Device) >= len(r.setup.NICs) || len(in.Data) < net.HeaderSize || len(in.Data) > net.MaxFrame {
			return bad(fmt.Sprintf("a frame of %d bytes for NIC %d", len(in.Data), in.Device), fmt.Sprintf("%d NICs", len(r.setup.NICs)))
		}
	case vmm.InputLink:
		if int(in.Device) >= len(r.setup.NICs) {
			return bad(fmt.Sprintf("the link of NIC %d", in.Device), fmt.Sprintf("%d NICs", len(r.setup.NICs)))
		}
	case vmm.InputConsole:
		n := r.setup.Serial
		if r.setup.Console {
			n++
		}
		if int(in.Device) >= n {
			return bad(fmt.Sprintf("console %d", in.Device), fmt.Sprintf("%d consoles", n))
		}
	case vmm.InputEntropy:
		n, ok := r.entropy[in.Tag]
		if !ok || len(in.Data) > n {
			return bad(fmt.Sprintf("%d random bytes for request %d", len(in.Data), in.Tag), "there is no such request")
		}
		delete(r.entropy, in.Tag)
	}
	return true
}

// Sample returns the time that the recorded guest was told.
func (r *Replayer) Sample(pos vmm.Position) int64 {
	if r.found != nil || r.ended && r.peek() == nil {
		return r.time
	}
	r.track.enter(pos.Exit)
	e := r.peek()
	if e == nil || e.Kind != log.Sample || e.Pos != pos {
		r.diverge(pos, "the guest reads a clock", r.expected(), "a reading of the clock at "+pos.String())
		return r.time
	}
	r.head++
	if e.Time > r.time+maxJump {
		r.diverge(pos, "the guest reads a clock", fmt.Sprintf("the time jumps to %d ns", e.Time), fmt.Sprintf("it is %d ns", r.time))
		return r.time
	}
	return r.advanceTime(e.Time)
}

// advanceTime keeps a log's time from going back, and from reaching "never".
func (r *Replayer) advanceTime(t int64) int64 {
	r.time = max(r.time, min(t, devices.Never-1-maxJump))
	return r.time
}

// Wait returns at once: time is what the log says. What comes at a later round is taken there.
func (r *Replayer) Wait(pos vmm.Position, _ int64) {
	r.last = pos
	r.compareHere()
	next := r.peek()
	switch mark := r.queue.mark; {
	case r.found != nil || r.ended || r.finished(vmm.Position{Exit: pos.Exit, Round: pos.Round + 1}):
	case next != nil && next.Pos.Exit == pos.Exit && next.Pos.Round > pos.Round:
	case next == nil && mark.Kind == log.Here && mark.Pos.Exit == pos.Exit: // of a later round
	default:
		r.diverge(pos, "the guest waits", r.expected(), "it waits for an interrupt")
	}
}

// Due implements [vmm.AsyncSource]: stops are those of the log.
func (r *Replayer) Due(vmm.Position) bool { return false }

// Next returns the stop to land on in this segment.
func (r *Replayer) Next(pos vmm.Position) (vmm.Stop, bool) {
	if r.found != nil || r.ended {
		return vmm.Stop{}, false
	}
	r.compareHere()
	e := r.peek()
	if e == nil || e.Kind != log.Stop || e.Pos.Exit != pos.Exit || e.Pos.Round != pos.Round || e.Pos.Count <= pos.Count {
		return vmm.Stop{}, false
	}
	return e.Stop, true
}

// Stopped takes the stop off the log.
func (r *Replayer) Stopped(pos vmm.Position, _ vmm.Stop) {
	r.arrive(pos)
	r.head++
}

// observe folds an exit into the digest, and compares it with its record if the log has one.
func (r *Replayer) observe(x *vmm.ExitRecord) {
	r.track.enter(x.Pos.Exit)
	k := &r.recent[r.nrecent%len(r.recent)]
	k.r, k.regs = *x, *x.Regs
	r.nrecent++
	r.track.Exit(x)
	if !r.setup.Details || r.found != nil || r.ended && r.peek() == nil {
		return
	}
	e := r.peek()
	if e == nil || e.Kind != log.Record || e.Pos != x.Pos {
		r.diverge(x.Pos, "what the exit is about", r.expected(), describe(x, x.Regs))
		return
	}
	r.head++
	have, want := e.Regs, *x.Regs
	have.RFLAGS &^= resumeFlag
	want.RFLAGS &^= resumeFlag
	if e.Exit.Kind != x.Kind || e.Exit.Addr != x.Addr || e.Exit.Size != x.Size || e.Exit.Data != x.Data || have != want {
		r.diverge(x.Pos, "what the exit is about", describe(&e.Exit, &e.Regs), describe(x, x.Regs))
	}
}

// Anywhere and EveryStop: inputs come at their positions, so every stop is asked.
func (r *Replayer) Anywhere() bool  { return false }
func (r *Replayer) EveryStop() bool { return true }

// The rest of [vmm.InputSource]: nothing happens between positions.
func (r *Replayer) Arm(int64)           {}
func (r *Replayer) Applied([]vmm.Input) {}
func (r *Replayer) SetTime(t int64)     { r.advanceTime(t) }
func (r *Replayer) Pause()              {}
func (r *Replayer) Resume()             {}

// Disk keeps a request until the log says that it is complete.
func (r *Replayer) Disk(device int, q *vmm.DiskRequest) {
	r.track.Disk(device, q)
	r.pending[request{device, q.Tag}] = q
}

// Frame folds a frame into the digest.
func (r *Replayer) Frame(device int, frame []byte) { r.track.Frame(device, frame) }

// Offloads does nothing: the frames of the log are as they were.
func (r *Replayer) Offloads(int, vmm.Offloads) {}

// Console shows what the guest writes.
func (r *Replayer) Console(device int, p []byte) {
	r.track.Console(device, p)
	if r.opts.Output != nil {
		r.opts.Output(device, p)
	}
}

// Entropy notes a request for random bytes.
func (r *Replayer) Entropy(tag uint64, n int) {
	r.track.Entropy(tag, n)
	r.entropy[tag] = n
}
