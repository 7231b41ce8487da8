package vmm

import (
	"crypto/rand"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ftvmm/ftvmm/devices"
	"github.com/ftvmm/ftvmm/devices/virtio/blk"
	"github.com/ftvmm/ftvmm/devices/virtio/net"
	"github.com/ftvmm/ftvmm/vmm/backend"
)

// Shorter names for the types that cross the machine's border.
type (
	DiskRequest = blk.Request
	Offloads    = net.Offloads
)

// Limits of the queue between the backends and the vCPU loop.
const (
	// MaxQueuedFrames bounds the received frames of one NIC that wait for the loop; then
	// the NIC's goroutine blocks and the network drops, as at a full receive ring.
	MaxQueuedFrames = 256
	// MaxQueuedConsole bounds the console bytes that wait for the loop, for each console.
	MaxQueuedConsole = 64 << 10
	// MaxEntropy bounds one request for random bytes.
	MaxEntropy = 64 << 10
	// maxConsoleInput is the most bytes of one InputConsole.
	maxConsoleInput = 1 << 10

	// lingerTime is how long an entry is put off for the answer to a frame: some more than the way to
	// a program on this host and back.
	lingerTime = 60 * time.Microsecond
	// haltTime is how long a halted guest's thread looks for inputs before it sleeps: about what
	// it takes to wake it.
	haltTime = 40 * time.Microsecond
	// maxMisses bounds how rarely either is tried where nothing comes in time: after
	// n misses in a row it is left out 2^n times.
	maxMisses = 8
)

// Live connects a guest to the present: it is the input source and output sink of a guest
// that runs unprotected. Backends post from their goroutines into a bounded queue; the
// vCPU loop takes from it.
type Live struct {
	bell  *Bell
	disks []backend.Disk
	nics  []backend.NIC
	cons  []Console
	log   *slog.Logger

	// Virtual time is host monotonic time less what passed while paused. Only the loop uses these.
	base   time.Time // the host's monotonic clock at virtual time `start`
	start  int64
	paused bool
	last   int64 // the last sample: time never goes back

	// frameRoom and consoleRoom tell how many frames or bytes a device can take; what it
	// cannot stays in the queue.
	frameRoom   func(nic int) int
	consoleRoom func(console int) int
	leftover    bool // Take left something: ask again at every exit

	timer    int // a timerfd on CLOCK_MONOTONIC
	armed    int64
	timerDue atomic.Bool

	sent    atomic.Bool // a frame has left since the last entry
	answers polling     // after a frame
	halts   polling     // in a HLT

	mu     sync.Mutex
	room   sync.Cond // signalled when the queue shrinks or the source closes
	queue  []Input
	frames []int // queued frames of each NIC
	bytes  []int // queued bytes of each console
	// What each device still has room for within one Take.
	frameLeft, consoleLeft []int

	carriers map[int]bool // what the NICs last said

	arrived func(nic int, frame []byte)
	held    bool // while muted: frames are kept, as far as there is room
	muted   bool // what comes is dropped: the guest does not live here
	closed  bool
	wg      sync.WaitGroup
}

// Console is one end of a serial line or console: a terminal, a file, a socket.
type Console interface {
	// Output sends bytes that the guest wrote. The buffer is lent for the call.
	Output(p []byte)
	// Start begins delivery of input: deliver is called from one goroutine with bytes that
	// it copies; it blocks while the guest does not read.
	Start(deliver func(p []byte))
}

// NewLive returns a source and sink on these backends; the index of a backend is the
// device number in inputs and outputs. A nil console discards output. The backends belong to
// the caller, who closes them after [Live.Close].
func NewLive(disks []backend.Disk, nics []backend.NIC, consoles []Console) (*Live, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("vmm: create timer: %w", err)
	}
	l := &Live{
		disks: disks, nics: nics, cons: consoles, timer: fd, armed: devices.Never, paused: true,
		carriers: map[int]bool{},
		frames:   make([]int, len(nics)), bytes: make([]int, len(consoles)), log: slog.Default(),
		frameLeft: make([]int, len(nics)), consoleLeft: make([]int, len(consoles)),
	}
	l.room.L = &l.mu
	return l, nil
}

// Attach starts the backends' deliveries.
func (l *Live) Attach(bell *Bell) {
	l.bell = bell
	l.wg.Add(1)
	go l.watchTimer()
	for i, n := range l.nics {
		n.Start(func(frame []byte) { l.postFrame(i, frame) }, func(up bool) {
			l.mu.Lock()
			l.carriers[i] = up
			l.mu.Unlock()
			l.post(Input{Kind: InputLink, Device: uint16(i), Up: up})
		})
	}
	for i, c := range l.cons {
		if c != nil {
			c.Start(func(p []byte) { l.postConsole(i, p) })
		}
	}
}

// Close releases blocked deliveries and ends the timer. The machine no longer runs.
func (l *Live) Close() error {
	l.mu.Lock()
	l.closed = true
	l.room.Broadcast()
	l.mu.Unlock()
	// The watcher sees closed at the timer's next expiry, which is now.
	l.setTimer(1)
	l.wg.Wait()
	return unix.Close(l.timer)
}

// watchTimer turns expiries of the timerfd into rings of the bell. A Go timer would do
// if the runtime did not round sleeps up to a millisecond.
func (l *Live) watchTimer() {
	defer l.wg.Done()
	var b [8]byte
	for {
		if _, err := unix.Read(l.timer, b[:]); err != nil && err != unix.EINTR {
			l.log.Error("timer failed", "err", err)
			return
		}
		l.mu.Lock()
		closed := l.closed
		l.mu.Unlock()
		if closed {
			return
		}
		l.timerDue.Store(true)
		l.bell.Ring()
	}
}

func (l *Live) setTimer(d time.Duration) {
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(int64(max(d, 1)))}
	if err := unix.TimerfdSettime(l.timer, 0, &spec, nil); err != nil {
		l.log.Error("cannot set timer", "err", err)
	}
}

// now returns virtual time.
func (l *Live) now() int64 {
	if !l.paused {
		l.last = max(l.last, l.start+int64(time.Since(l.base)))
	}
	return l.last
}

// Sample returns the present virtual time.
func (l *Live) Sample(Position) int64 { return l.now() }

// Pause stops virtual time.
func (l *Live) Pause() {
	l.now()
	l.paused = true
}

// Resume lets virtual time go on from where it was.
func (l *Live) Resume() {
	if l.paused {
		l.base, l.start, l.paused = time.Now(), l.last, false
		l.armed = devices.Never // the timer was set for another base
	}
}

// SetTime sets virtual time, before the first entry or while paused: the guest was restored.
func (l *Live) SetTime(t int64) {
	l.last, l.start, l.base = t, t, time.Now()
}

// Anywhere reports true: nobody replays this guest.
func (l *Live) Anywhere() bool { return true }

// EveryStop reports whether something waits for room in a device, which the guest makes
// at an exit; else the bell tells.
func (l *Live) EveryStop() bool { return l.leftover }

// Arm sets the host's timer for the guest's next deadline. Moving a deadline back is
// common and costs nothing here: the timer then expires early and is set again.
func (l *Live) Arm(next int64) {
	if next >= l.armed || next == devices.Never {
		return
	}
	l.armed = next
	l.setTimer(time.Duration(next - l.now()))
}

// Lingerer is an [InputSource] whose guest's entry is worth putting off now and then. It must
// take inputs anywhere: those that come meanwhile reach the guest before it goes on.
type Lingerer interface {
	// Linger is called on the vCPU loop before each entry.
	Linger()
}

// Linger waits a moment for the answer to what the guest has just sent. A program on this host
// that makes one request after another is answered and asks again within some ten microseconds. If
// the guest is entered before that, it finds nothing to do, arms its interrupt and goes to sleep, and must
// be stopped on its way; else it finds the next request when it looks for more.
func (l *Live) Linger() {
	if l.sent.Load() {
		l.sent.Store(false)
		l.answers.wait(l.bell, lingerTime)
	}
}

// polling waits for the bell without sleeping, as long as that pays.
type polling struct {
	misses int // waits in a row in which it did not ring
	skip   int // waits to leave out
}

// wait returns when the bell has rung, or after d at the latest. It returns whether it has rung.
func (p *polling) wait(b *Bell, d time.Duration) bool {
	if p.skip > 0 {
		p.skip--
		return b.Rung()
	}
	for began := time.Now(); !b.Rung(); {
		if time.Since(began) >= d {
			p.misses = min(p.misses+1, maxMisses)
			p.skip = 1 << p.misses
			return false
		}
	}
	p.misses = 0
	return true
}

// Take returns what the backends have posted, and the time if a timer is due.
func (l *Live) Take(_ Position, next int64, buf []Input) []Input {
	if l.timerDue.Load() {
		l.timerDue.Store(false)
		l.armed = devices.Never
	}
	if next != devices.Never {
		if now := l.now(); now >= next {
			buf = append(buf, Input{Kind: InputTime, Time: now})
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.queue) == 0 {
		return buf
	}
	took, kept := len(buf), l.queue[:0]
	for i := range l.frameLeft {
		l.frameLeft[i] = -1 // not asked
	}
	for i := range l.consoleLeft {
		l.consoleLeft[i] = -1
	}
	for _, in := range l.queue {
		ok := true
		switch in.Kind {
		case InputFrame:
			if ok = fits(&l.frameLeft[in.Device], 1, int(in.Device), l.frameRoom); ok {
				l.frames[in.Device]--
			}
		case InputConsole:
			if ok = fits(&l.consoleLeft[in.Device], len(in.Data), int(in.Device), l.consoleRoom); ok {
				l.bytes[in.Device] -= len(in.Data)
			}
		}
		if ok {
			buf = append(buf, in)
		} else {
			kept = append(kept, in)
		}
	}
	clear(l.queue[len(kept):])
	l.queue = kept
	l.leftover = len(kept) > 0
	if len(buf) > took {
		l.room.Broadcast()
	}
	return buf
}

// fits takes n from what a device has room for, asking it the first time. After one
// refusal nothing fits, so that a device's inputs stay in order.
func fits(left *int, n, device int, room func(int) int) bool {
	if *left < 0 {
		*left = room(device)
	}
	if n > *left {
		*left = 0
		return false
	}
	*left -= n
	return true
}

// Applied returns frame buffers to their pool.
func (l *Live) Applied(inputs []Input) {
	for i := range inputs {
		if inputs[i].Kind == InputFrame {
			backend.PutFrame(inputs[i].Data)
		}
	}
}

// Wait returns when the bell has rung or the deadline has passed.
func (l *Live) Wait(_ Position, next int64) {
	if (next == devices.Never || next-l.now() > int64(haltTime)) && l.halts.wait(l.bell, haltTime) {
		return
	}
	if next == devices.Never {
		l.bell.Sleep(-1)
		return
	}
	l.bell.Sleep(time.Duration(max(next-l.now(), 0)))
}

func (l *Live) post(in Input) {
	l.mu.Lock()
	if l.muted {
		l.mu.Unlock()
		return
	}
	l.queue = append(l.queue, in)
	l.mu.Unlock()
	l.bell.Ring()
}

// OnFrame has f called with each frame that comes, from the NICs' goroutines, before it waits for the guest. It must be set before
// the machine is made.
func (l *Live) OnFrame(f func(nic int, frame []byte)) { l.arrived = f }

// Inject posts a frame, in a buffer from [backend.GetFrame], as if it came from a NIC. It does not wait: where there is no room
// the frame is lost.
func (l *Live) Inject(nic int, frame []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.frames[nic] >= MaxQueuedFrames || l.muted {
		backend.PutFrame(frame)
		return
	}
	l.frames[nic]++
	l.queue = append(l.queue, Input{Kind: InputFrame, Device: uint16(nic), Data: frame})
	l.bell.Ring()
}

func (l *Live) postFrame(nic int, frame []byte) {
	if l.arrived != nil {
		l.arrived(nic, frame)
	}
	l.mu.Lock()
	for l.frames[nic] >= MaxQueuedFrames && !l.closed && !l.muted {
		l.room.Wait()
	}
	if l.muted && (!l.held || l.frames[nic] >= MaxQueuedFrames) {
		l.mu.Unlock()
		backend.PutFrame(frame)
		return
	}
	l.frames[nic]++
	l.queue = append(l.queue, Input{Kind: InputFrame, Device: uint16(nic), Data: frame})
	l.mu.Unlock()
	l.bell.Ring()
}

func (l *Live) postConsole(c int, p []byte) {
	for len(p) > 0 {
		l.mu.Lock()
		for l.bytes[c] >= MaxQueuedConsole && !l.closed && !l.muted {
			l.room.Wait()
		}
		if l.closed || l.muted {
			l.mu.Unlock()
			return
		}
		n := min(len(p), MaxQueuedConsole-l.bytes[c], maxConsoleInput)
		l.bytes[c] += n
		l.queue = append(l.queue, Input{Kind: InputConsole, Device: uint16(c), Data: append([]byte(nil), p[:n]...)})
		l.mu.Unlock()
		l.bell.Ring()
		p = p[n:]
	}
}

// Mute drops all that waits and, until it is called with false, all that comes: the guest's twin lives, not this one.
// When it ends the guest is told of its carriers anew.
func (l *Live) Mute(on bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.muted, l.held = on, false
	if !on {
		for i := range l.nics {
			if up, ok := l.carriers[i]; ok {
				l.queue = append(l.queue, Input{Kind: InputLink, Device: uint16(i), Up: up})
			}
		}
		return
	}
	for i := range l.queue {
		if l.queue[i].Kind == InputFrame {
			backend.PutFrame(l.queue[i].Data)
		}
	}
	clear(l.queue)
	l.queue = l.queue[:0]
	clear(l.frames)
	clear(l.bytes)
	l.leftover = false
	l.room.Broadcast()
}

// Hold has a source that is muted keep the frames that come from now on: the guest may live here in a moment, and those who
// sent them would wait long before they sent them again. To be muted again drops them.
func (l *Live) Hold() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.held = l.muted
}

// Complete posts the completion of a disk request that was not started with Disk.
func (l *Live) Complete(device int, tag uint64, status uint8) {
	l.post(Input{Kind: InputDisk, Device: uint16(device), Tag: tag, Status: status})
}

// Disks returns the backends.
func (l *Live) Disks() []backend.Disk { return l.disks }

// PressPowerButton posts the press. Any goroutine may call it.
func (l *Live) PressPowerButton() { l.post(Input{Kind: InputPowerButton}) }

// PressReset posts a press of the reset button. Any goroutine may call it.
func (l *Live) PressReset() { l.post(Input{Kind: InputReset}) }

// Disk starts a request on its backend.
func (l *Live) Disk(device int, r *DiskRequest) {
	tag := r.Tag
	l.disks[device].Submit(r, func(err error) {
		in := Input{Kind: InputDisk, Device: uint16(device), Tag: tag}
		if err != nil {
			l.log.Warn("disk request failed", "disk", device, "op", r.Op, "offset", r.Offset, "length", r.Length, "err", err)
			in.Status = uint8(blk.StatusIOErr)
		}
		l.post(in)
	})
}

// Frame sends a frame.
func (l *Live) Frame(device int, frame []byte) {
	l.nics[device].Transmit(frame)
	l.sent.Store(true)
}

// Offloads passes the driver's choice on.
func (l *Live) Offloads(device int, o Offloads) { l.nics[device].SetOffloads(o) }

// Console sends console bytes.
func (l *Live) Console(device int, p []byte) {
	if c := l.cons[device]; c != nil {
		c.Output(p)
	}
}

// Entropy answers a request for random bytes at once, as an input of the next stop.
func (l *Live) Entropy(tag uint64, n int) {
	b := make([]byte, min(n, MaxEntropy))
	_, _ = rand.Read(b) // never fails (crypto/rand)
	l.post(Input{Kind: InputEntropy, Tag: tag, Data: b})
}
