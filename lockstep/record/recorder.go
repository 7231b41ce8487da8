package record

import (
	"errors"
	"io"
	"time"

	"github.com/ftvmm/ftvmm/devices/virtio/blk"
	"github.com/ftvmm/ftvmm/lockstep/log"
	"github.com/ftvmm/ftvmm/vmm"
)

// Limits of a recorder.
const (
	// Patience is how long something waits for a synchronous exit of the guest before the recorder makes an
	// asynchronous stop: those cost a replay milliseconds each.
	Patience = time.Millisecond
	// markInputs and markBytes are after how many inputs, or bytes of them, a mark follows at the next opportunity, so that
	// a reader need not hold much.
	markInputs = 64
	markBytes  = 1 << 20
	// markAfter is how old a mark becomes in a guest that waits: what has happened since is lost if the
	// program dies.
	markAfter = 100 * time.Millisecond
)

// Options choose what is recorded.
type Options struct {
	// Counter names asynchronous stops; "" is vmm.CounterNone: then inputs reach a guest that makes no exits late.
	Counter vmm.CounterKind
	// Details records what each exit was about and all registers, some 20 bytes more an
	// exit, so that both sides of a divergence can be shown.
	Details bool
}

// Recorder is the source and sink of a machine whose run is recorded. See [vmm.InputSource] for who
// calls its methods.
type Recorder struct {
	in   vmm.InputSource
	out  vmm.OutputSink
	opts Options

	cfg  *vmm.Config
	bell *vmm.Bell
	log  *log.Writer
	enc  log.Encoder

	track   tracker
	last    vmm.Position // the last stop
	waiting bool         // in a HLT
	checks  []uint8      // of the exits since the last mark
	inputs  int          // since the last mark
	bytes   int
	marked  time.Time
	reads   map[request]*vmm.DiskRequest

	// What is waiting for an asynchronous stop: since when, at which exit.
	dueSince time.Time
	dueExit  uint64
	timer    *time.Timer
}

// request names a disk request.
type request struct {
	disk int
	tag  uint64
}

// NewRecorder returns a recorder for the machine that will be made from cfg, which it changes: the
// machine's world is then seen through the recorder. Begin follows when the machine is made.
func NewRecorder(cfg *vmm.Config, opts Options) *Recorder {
	r := &Recorder{opts: opts, cfg: cfg, reads: map[request]*vmm.DiskRequest{}}
	r.track.over = r.over
	if cfg.Epoch.IsZero() {
		cfg.Epoch = time.Now()
	}
	cfg.Counter = opts.Counter
	inner, observe := cfg.Wrap, cfg.Observe
	cfg.Wrap = func(in vmm.InputSource, out vmm.OutputSink) (vmm.InputSource, vmm.OutputSink) {
		if inner != nil {
			in, out = inner(in, out)
		}
		r.in, r.out = in, out
		return r, r
	}
	cfg.Observe = func(e *vmm.ExitRecord) {
		if observe != nil {
			observe(e)
		}
		r.observe(e)
	}
	return r
}

// Begin begins the log on w, with machine m, which has not run. A machine that was restored is
// recorded from its state, another from power-on.
func (r *Recorder) Begin(m *vmm.Machine, w io.Writer, restored bool) error {
	setup, blobs := log.NewSetup(r.cfg, m)
	setup.Details, setup.State = r.opts.Details, restored
	var state func(io.Writer) error
	if restored {
		s, err := m.State()
		if err != nil {
			return err
		}
		setup.Start, state = s.Position, m.WriteState
	}
	r.marked = time.Now()
	r.enc, r.last, r.track.exit = log.NewEncoder(setup.Start), setup.Start, setup.Start.Exit
	l, err := log.NewWriter(w, setup, blobs, state)
	r.log = l
	return err
}

// End completes the log: the machine's run has ended so. The file belongs to the caller.
func (r *Recorder) End(end vmm.Exit) error {
	if r.log == nil {
		return errors.New("record: the recording has not begun")
	}
	if r.timer != nil {
		r.timer.Stop()
	}
	if r.waiting {
		r.here()
	} else {
		r.over(r.track.exit)
		r.mark(log.Closed, vmm.Position{Exit: r.track.exit})
	}
	r.log.Append(func(b []byte) []byte { return r.enc.End(b, r.last, end) })
	return r.log.Close()
}

// Stats tells the size of the log's entries so far, and whether writing has failed.
func (r *Recorder) Stats() (bytes int64, err error) { return r.log.Bytes(), r.log.Err() }

// over keeps the check of an exit that is over.
func (r *Recorder) over(exit uint64) {
	r.checks = append(r.checks, log.Check(r.track.Sum()))
	if len(r.checks) == log.MaxChecks || r.inputs >= markInputs || r.bytes >= markBytes {
		r.mark(log.Closed, vmm.Position{Exit: exit})
	}
}

// here marks the last stop.
func (r *Recorder) here() { r.mark(log.Here, r.last) }

func (r *Recorder) mark(kind log.Kind, pos vmm.Position) {
	r.log.Append(func(b []byte) []byte { return r.enc.Mark(b, kind, pos, r.checks, r.track.Sum()) })
	r.checks, r.inputs, r.bytes, r.marked = r.checks[:0], 0, 0, time.Now()
}

// Attach implements [vmm.InputSource].
func (r *Recorder) Attach(bell *vmm.Bell) {
	r.bell = bell
	r.in.Attach(bell)
}

// Take takes what the world has for this stop, and logs it.
func (r *Recorder) Take(pos vmm.Position, next int64, buf []vmm.Input) []vmm.Input {
	r.track.enter(pos.Exit)
	r.last, r.waiting = pos, pos.Round > 0 && pos.Count == 0
	n := len(buf)
	buf = r.in.Take(pos, next, buf)
	for i := range buf[n:] {
		r.input(pos, &buf[n+i])
	}
	if !r.dueSince.IsZero() {
		r.dueSince = time.Time{}
		r.timer.Stop()
	}
	return buf
}

func (r *Recorder) input(pos vmm.Position, in *vmm.Input) {
	data := in.Data
	if in.Kind == vmm.InputDisk {
		data = nil
		key := request{int(in.Device), in.Tag}
		if q := r.reads[key]; q != nil {
			delete(r.reads, key)
			if blk.Status(in.Status) == blk.StatusOK {
				data = q.Data
			}
		}
		r.track.Read(int(in.Device), in.Tag, in.Status, data)
	}
	r.inputs++
	r.bytes += len(data)
	r.log.Append(func(b []byte) []byte { return r.enc.Input(b, pos, in, data) })
}

// Sample logs the time that the guest is told.
func (r *Recorder) Sample(pos vmm.Position) int64 {
	r.track.enter(pos.Exit)
	t := r.in.Sample(pos)
	r.inputs++
	r.log.Append(func(b []byte) []byte { return r.enc.Sample(b, pos, t) })
	return t
}

// Wait waits for the world, in a HLT.
func (r *Recorder) Wait(pos vmm.Position, next int64) {
	r.last, r.waiting = pos, true
	if r.inputs >= markInputs || r.bytes >= markBytes || time.Since(r.marked) >= markAfter {
		r.here()
	}
	r.in.Wait(pos, next)
}

// Due implements [vmm.AsyncSource]: an asynchronous stop is due when something has waited for long.
func (r *Recorder) Due(pos vmm.Position) bool {
	due := false
	if r.dueSince.IsZero() || r.dueExit != pos.Exit {
		r.dueSince, r.dueExit = time.Now(), pos.Exit
	} else {
		due = time.Since(r.dueSince) >= Patience
	}
	// Ask again when the patience has ended, unless Take is called before: there may be no
	// exit until then, or the stop may have no name.
	if r.timer == nil {
		r.timer = time.AfterFunc(Patience, r.bell.Ring)
	} else {
		r.timer.Reset(Patience)
	}
	return due
}

// Stopped logs an asynchronous stop.
func (r *Recorder) Stopped(pos vmm.Position, s vmm.Stop) {
	if r.inputs >= markInputs || r.bytes >= markBytes {
		r.here()
	}
	r.inputs++
	r.log.Append(func(b []byte) []byte { return r.enc.Stop(b, pos, s) })
}

// Next implements [vmm.AsyncSource]: the recorder does not land.
func (r *Recorder) Next(vmm.Position) (vmm.Stop, bool) { return vmm.Stop{}, false }

// observe folds an exit into the digest.
func (r *Recorder) observe(e *vmm.ExitRecord) {
	r.track.enter(e.Pos.Exit)
	if e.Pos != r.last {
		r.last, r.waiting = e.Pos, false
	}
	r.track.Exit(e)
	if r.opts.Details {
		r.log.Append(func(b []byte) []byte { return r.enc.Record(b, e) })
	}
}

// Anywhere reports false: what reaches a recorded guest does so at a position.
func (r *Recorder) Anywhere() bool { return false }

// The rest of [vmm.InputSource] is the world's.
func (r *Recorder) EveryStop() bool            { return r.in.EveryStop() }
func (r *Recorder) Arm(next int64)             { r.in.Arm(next) }
func (r *Recorder) Applied(inputs []vmm.Input) { r.in.Applied(inputs) }
func (r *Recorder) SetTime(t int64)            { r.in.SetTime(t) }
func (r *Recorder) Pause()                     { r.in.Pause() }
func (r *Recorder) Resume()                    { r.in.Resume() }

// buttons is what a live source offers to press.
type buttons interface {
	PressPowerButton()
	PressReset()
}

// PressPowerButton has the world press the power button.
func (r *Recorder) PressPowerButton() {
	if b, ok := r.in.(buttons); ok {
		b.PressPowerButton()
	}
}

// PressReset has the world press the reset button.
func (r *Recorder) PressReset() {
	if b, ok := r.in.(buttons); ok {
		b.PressReset()
	}
}

// Disk passes a request on; the data of a read is logged when it is complete.
func (r *Recorder) Disk(device int, q *vmm.DiskRequest) {
	r.track.Disk(device, q)
	if q.Op == blk.Read {
		r.reads[request{device, q.Tag}] = q
	}
	r.out.Disk(device, q)
}

// Frame passes a frame on.
func (r *Recorder) Frame(device int, frame []byte) {
	r.track.Frame(device, frame)
	r.out.Frame(device, frame)
}

// Offloads passes the driver's choice on.
func (r *Recorder) Offloads(device int, o vmm.Offloads) { r.out.Offloads(device, o) }

// Console passes console output on.
func (r *Recorder) Console(device int, p []byte) {
	r.track.Console(device, p)
	r.out.Console(device, p)
}

// Entropy passes a request for random bytes on; they are logged when they come.
func (r *Recorder) Entropy(tag uint64, n int) {
	r.track.Entropy(tag, n)
	r.out.Entropy(tag, n)
}
