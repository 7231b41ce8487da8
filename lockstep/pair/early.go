package pair

import (
	"bytes"
	"encoding/binary"
	"sync/atomic"
	"time"

	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/backend"
)

// A frame for the guest waits on the live side for a stop at which the guest can get it, a millisecond at times. If the
// host is lost meanwhile nobody has the frame but its sender, who waits for some 200 ms before sending it again (the least
// retransmission timeout of TCP). So each frame is sent to the backup as it comes, beside the log and before its entry there. A backup that goes
// live gives its guest those that the log does not have. It is a courtesy: a network may lose frames, and repeat them.

// Limits of early frames.
const (
	// maxEarly is the largest frame that is sent early, in bytes: one of a stream has others behind it, whose
	// answers tell of its loss at once.
	maxEarly = 2048
	// earlyRate bounds early frames in a millisecond.
	earlyRate = 16
	// keepEarly bounds those that a backup keeps, and earlyAge for how long.
	keepEarly = 256
	earlyAge  = 500 * time.Millisecond
)

// earlyFrame is a frame that the log does not have yet.
type earlyFrame struct {
	nic  int
	data []byte
	at   time.Time
}

// earlySender decides which frames are sent early. Its method is called from the goroutines of network cards.
type earlySender struct {
	out   atomic.Pointer[sender]
	slot  atomic.Int64 // the present millisecond
	count atomic.Int32 // frames in it
}

// arrived takes a frame for a live guest. It is lent for the call.
func (p *Pair) arrived(nic int, frame []byte) {
	out := p.early.out.Load()
	if out == nil || len(frame) > maxEarly || !p.world.logging.Load() {
		return
	}
	now := time.Now().UnixMilli()
	if p.early.slot.Swap(now) != now {
		p.early.count.Store(0)
	}
	if p.early.count.Add(1) > earlyRate {
		return
	}
	b := make([]byte, 3, 3+len(frame))
	b[0] = frameEarly
	binary.LittleEndian.PutUint16(b[1:], uint16(nic))
	out.raw(append(b, frame...))
}

// keepFrame keeps a frame that the log does not have yet.
func (p *Pair) keepFrame(b []byte) {
	if len(b) < 2+frameHeader || len(b) > 2+maxEarly {
		return
	}
	nic := int(binary.LittleEndian.Uint16(b))
	if nic >= len(p.cfg.NICs) {
		return
	}
	now := time.Now()
	for len(p.frames) > 0 && (len(p.frames) >= keepEarly || now.Sub(p.frames[0].at) > earlyAge) {
		p.frames = p.frames[1:]
	}
	p.frames = append(p.frames, earlyFrame{nic, b[2:], now})
}

// logged forgets a frame that the log has. Frames of a card are logged in their order, so those before it that were
// sent early are in the log, too, or lost.
func (p *Pair) logged(in *vmm.Input) {
	for i := range p.frames {
		if f := &p.frames[i]; f.nic == int(in.Device) && bytes.Equal(f.data, in.Data) {
			p.frames = append(p.frames[:i], p.frames[i+1:]...)
			return
		}
	}
}

// covered forgets the frames that came before a cut was taken, now that the cut is in place: the guest has got them, all but
// a few that were waiting.
func (p *Pair) covered(taken time.Time) {
	n := 0
	for n < len(p.frames) && p.frames[n].at.Before(taken) {
		n++
	}
	p.frames = p.frames[n:]
}

// unlogged returns the frames that the log does not have, and forgets them.
func (p *Pair) unlogged() []earlyFrame {
	f := p.frames
	p.frames = nil
	return f
}

// inject gives early frames to a guest that has gone live. On the vCPU loop.
func (w *world) inject(frames []earlyFrame) {
	for _, f := range frames {
		b := backend.GetFrame(len(f.data))
		copy(b, f.data)
		w.in.Inject(f.nic, b)
	}
}
