package log

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"github.com/ftvmm/ftvmm/lockstep/digest"
	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// Limits of an entry.
const (
	// MaxData bounds the data of one input: that of the largest disk request.
	MaxData = 4 << 20
	// MaxChecks bounds the exits between two marks.
	MaxChecks = 256
	// maxDetail bounds the text about how a guest ended.
	maxDetail = 4096
)

// Kind says what an [Entry] is.
type Kind uint8

// The kinds of entry. The values are part of the format.
const (
	Sample Kind = iota + 1 // the guest read a clock: Time
	Input                  // an input: Input; of a disk read, Input.Data is the data
	Stop                   // an asynchronous stop: Stop
	Closed                 // a mark: the log is complete up to exit Pos.Exit, inclusive
	Here                   // a mark: the log is complete up to Pos, in the middle of an exit's waits or its segment
	Record                 // what the exit was about, and its registers: Exit (logs with details only)
	End                    // how the guest ended: End
	Scrub                  // a piece of the guest's state: Piece, Sum (of a pair; recordings have none)
)

// Entry is one decoded entry. Data is that of the frame.
type Entry struct {
	Kind  Kind
	Pos   vmm.Position
	Time  int64
	Input vmm.Input
	Stop  vmm.Stop
	// Of a mark: Checks are those of the exits up to Pos.Exit, for Here without it; Sum is the digest at Pos.
	Checks []uint8
	Sum    digest.Sum
	Piece  uint64
	Exit   vmm.ExitRecord
	Regs   kvm.Regs // Exit.Regs
	End    vmm.Exit
}

// Check is what a mark keeps of the digest at one exit.
func Check(s digest.Sum) uint8 { return s[0] & 0x7f }

// The tags on disk: the input kinds have one each, so that the common ones are short.
const (
	tagSample = iota
	tagTime
	tagDisk
	tagFrame
	tagLink
	tagConsole
	tagEntropy
	tagPower
	tagReset
	tagStop
	tagClosed
	tagHere
	tagRecord
	tagEnd
	tagScrub
	numTags

	tagMask  = 0x0f
	posShift = 4
	posSame  = 0
	posExit  = 1
	posFull  = 2
)

var inputTags = [...]uint8{
	vmm.InputTime: tagTime, vmm.InputDisk: tagDisk, vmm.InputFrame: tagFrame, vmm.InputLink: tagLink,
	vmm.InputConsole: tagConsole, vmm.InputEntropy: tagEntropy, vmm.InputPowerButton: tagPower, vmm.InputReset: tagReset,
}

var tagInputs = [numTags]vmm.InputKind{
	tagTime: vmm.InputTime, tagDisk: vmm.InputDisk, tagFrame: vmm.InputFrame, tagLink: vmm.InputLink,
	tagConsole: vmm.InputConsole, tagEntropy: vmm.InputEntropy, tagPower: vmm.InputPowerButton, tagReset: vmm.InputReset,
}

// state is what entries are coded relative to; both ends keep it equal.
type state struct {
	pos  vmm.Position
	time int64
	tag  uint64
	regs [numRegs]uint64
}

const numRegs = 18

func regsOf(r *kvm.Regs) [numRegs]uint64 {
	return [...]uint64{
		r.RAX, r.RBX, r.RCX, r.RDX, r.RSI, r.RDI, r.RSP, r.RBP,
		r.R8, r.R9, r.R10, r.R11, r.R12, r.R13, r.R14, r.R15, r.RIP, r.RFLAGS,
	}
}

func regsFrom(v [numRegs]uint64) kvm.Regs {
	return kvm.Regs{
		RAX: v[0], RBX: v[1], RCX: v[2], RDX: v[3], RSI: v[4], RDI: v[5], RSP: v[6], RBP: v[7],
		R8: v[8], R9: v[9], R10: v[10], R11: v[11], R12: v[12], R13: v[13], R14: v[14], R15: v[15], RIP: v[16], RFLAGS: v[17],
	}
}

// Encoder turns entries into bytes. Positions must not go back. The zero value is
// for a log that starts at position 0.
type Encoder struct{ s state }

// NewEncoder returns an encoder for a log that starts at a position.
func NewEncoder(start vmm.Position) Encoder { return Encoder{state{pos: start}} }

func (e *Encoder) head(b []byte, tag uint8, pos vmm.Position) []byte {
	from := e.s.pos
	e.s.pos = pos
	switch {
	case pos == from:
		return append(b, tag|posSame<<posShift)
	case pos.Round == 0 && pos.Count == 0:
		return binary.AppendUvarint(append(b, tag|posExit<<posShift), pos.Exit-from.Exit)
	}
	b = binary.AppendUvarint(append(b, tag|posFull<<posShift), pos.Exit-from.Exit)
	b = binary.AppendUvarint(b, uint64(pos.Round))
	return binary.AppendUvarint(b, pos.Count)
}

// time appends a time. Differences wrap, so that any time can be coded.
func (e *Encoder) time(b []byte, t int64) []byte {
	b = binary.AppendUvarint(b, uint64(t)-uint64(e.s.time))
	e.s.time = t
	return b
}

func appendBytes(b, data []byte) []byte {
	return append(binary.AppendUvarint(b, uint64(len(data))), data...)
}

// Sample appends the guest's reading of a clock.
func (e *Encoder) Sample(b []byte, pos vmm.Position, t int64) []byte {
	return e.time(e.head(b, tagSample, pos), t)
}

// Input appends an input; data is that of the input, or of the disk read that it completes.
func (e *Encoder) Input(b []byte, pos vmm.Position, in *vmm.Input, data []byte) []byte {
	b = e.head(b, inputTags[in.Kind], pos)
	switch in.Kind {
	case vmm.InputTime:
		b = e.time(b, in.Time)
	case vmm.InputDisk:
		b = binary.AppendUvarint(b, uint64(in.Device))
		b = binary.AppendVarint(b, int64(in.Tag-e.s.tag))
		e.s.tag = in.Tag
		b = appendBytes(append(b, in.Status), data)
	case vmm.InputFrame, vmm.InputConsole:
		b = appendBytes(binary.AppendUvarint(b, uint64(in.Device)), data)
	case vmm.InputLink:
		up := uint8(0)
		if in.Up {
			up = 1
		}
		b = append(binary.AppendUvarint(b, uint64(in.Device)), up)
	case vmm.InputEntropy:
		b = appendBytes(binary.AppendUvarint(b, in.Tag), data)
	}
	return b
}

// Stop appends an asynchronous stop.
func (e *Encoder) Stop(b []byte, pos vmm.Position, s vmm.Stop) []byte {
	b = e.head(b, tagStop, pos)
	b = binary.AppendUvarint(b, s.RIP)
	b = binary.AppendUvarint(b, s.RCX)
	return binary.LittleEndian.AppendUint64(b, s.Regs)
}

// Mark appends a mark of kind Closed or Here.
func (e *Encoder) Mark(b []byte, kind Kind, pos vmm.Position, checks []uint8, sum digest.Sum) []byte {
	tag := uint8(tagClosed)
	if kind == Here {
		tag = tagHere
	}
	if kind == Closed && pos.Exit == e.s.pos.Exit {
		pos = e.s.pos // only the exit counts
	}
	b = binary.AppendUvarint(e.head(b, tag, pos), uint64(len(checks)))
	b = appendChecks(b, checks)
	return append(b, sum[:]...)
}

// appendChecks packs seven bits each, the first lowest.
func appendChecks(b []byte, checks []uint8) []byte {
	var acc uint64
	var n uint
	for _, c := range checks {
		acc |= uint64(c&0x7f) << n
		for n += 7; n >= 8; n -= 8 {
			b = append(b, byte(acc))
			acc >>= 8
		}
	}
	if n > 0 {
		b = append(b, byte(acc))
	}
	return b
}

func unpackChecks(p []byte, n int) []uint8 {
	out := make([]uint8, n)
	var acc uint64
	var have uint
	for i := range out {
		if have < 7 {
			acc |= uint64(p[0]) << have
			p, have = p[1:], have+8
		}
		out[i] = uint8(acc & 0x7f)
		acc, have = acc>>7, have-7
	}
	return out
}

// Record appends what an exit was about.
func (e *Encoder) Record(b []byte, r *vmm.ExitRecord) []byte {
	b = append(e.head(b, tagRecord, r.Pos), uint8(r.Kind), uint8(r.Size))
	b = binary.AppendUvarint(b, r.Addr)
	b = binary.AppendUvarint(b, r.Data)
	regs := regsOf(r.Regs)
	var changed uint64
	for i := range regs {
		if regs[i] != e.s.regs[i] {
			changed |= 1 << i
		}
	}
	b = binary.AppendUvarint(b, changed)
	for i := range regs {
		if changed&(1<<i) != 0 {
			b = binary.AppendUvarint(b, regs[i]^e.s.regs[i])
		}
	}
	e.s.regs = regs
	return b
}

// End appends how the guest ended.
func (e *Encoder) End(b []byte, pos vmm.Position, end vmm.Exit) []byte {
	b = appendBytes(e.head(b, tagEnd, pos), []byte(end.Reason))
	b = binary.AppendUvarint(b, uint64(end.Code))
	return appendBytes(b, []byte(end.Detail[:min(len(end.Detail), maxDetail)]))
}

// Scrub appends the hash of a piece of the guest's state.
func (e *Encoder) Scrub(b []byte, pos vmm.Position, piece uint64, sum digest.Sum) []byte {
	return append(binary.AppendUvarint(e.head(b, tagScrub, pos), piece), sum[:]...)
}

// Entry appends a decoded entry again.
func (e *Encoder) Entry(b []byte, x *Entry) []byte {
	switch x.Kind {
	case Sample:
		return e.Sample(b, x.Pos, x.Time)
	case Input:
		return e.Input(b, x.Pos, &x.Input, x.Input.Data)
	case Stop:
		return e.Stop(b, x.Pos, x.Stop)
	case Closed, Here:
		return e.Mark(b, x.Kind, x.Pos, x.Checks, x.Sum)
	case Scrub:
		return e.Scrub(b, x.Pos, x.Piece, x.Sum)
	case Record:
		r := x.Exit
		r.Regs = &x.Regs
		return e.Record(b, &r)
	}
	return e.End(b, x.Pos, x.End)
}

// ErrFormat reports bytes that are no entry.
var ErrFormat = errors.New("log: malformed entry")

// Decoder turns bytes into entries. The zero value is for a log that starts at position 0.
type Decoder struct {
	s state
	p []byte // what is left of the frame
}

// bad fails the decoding of an entry.
type bad string

func (d *Decoder) fail(format string, args ...any) { panic(bad(fmt.Sprintf(format, args...))) }

func (d *Decoder) uvarint() uint64 {
	v, n := binary.Uvarint(d.p)
	if n <= 0 {
		d.fail("a number is cut short or too long")
	}
	d.p = d.p[n:]
	return v
}

func (d *Decoder) varint() int64 {
	v, n := binary.Varint(d.p)
	if n <= 0 {
		d.fail("a number is cut short or too long")
	}
	d.p = d.p[n:]
	return v
}

func (d *Decoder) bytes(n uint64) []byte {
	if n > uint64(len(d.p)) {
		d.fail("%d bytes are wanted where %d are left", n, len(d.p))
	}
	b := d.p[:n:n]
	d.p = d.p[n:]
	return b
}

func (d *Decoder) byte() uint8 { return d.bytes(1)[0] }

func (d *Decoder) data(limit uint64) []byte {
	n := d.uvarint()
	if n > limit {
		d.fail("data of %d bytes, at most %d are allowed", n, limit)
	}
	return d.bytes(n)
}

func (d *Decoder) device() uint16 {
	v := d.uvarint()
	if v > math.MaxUint16 {
		d.fail("device %d", v)
	}
	return uint16(v)
}

func (d *Decoder) time() int64 {
	d.s.time = int64(uint64(d.s.time) + d.uvarint())
	return d.s.time
}

func (d *Decoder) position(how uint8) vmm.Position {
	p := d.s.pos
	if how == posSame {
		return p
	}
	delta := d.uvarint()
	if delta > math.MaxUint64-p.Exit {
		d.fail("%d exits after %d", delta, p.Exit)
	}
	next := vmm.Position{Exit: p.Exit + delta}
	switch how {
	case posExit:
	case posFull:
		round := d.uvarint()
		if round > math.MaxUint32 {
			d.fail("round %d", round)
		}
		next.Round, next.Count = uint32(round), d.uvarint()
	default:
		d.fail("form %d of position", how)
	}
	if Before(next, p) {
		d.fail("position %v after %v", next, p)
	}
	d.s.pos = next
	return next
}

// Before says whether a comes before b.
func Before(a, b vmm.Position) bool {
	switch {
	case a.Exit != b.Exit:
		return a.Exit < b.Exit
	case a.Round != b.Round:
		return a.Round < b.Round
	}
	return a.Count < b.Count
}

// Feed gives the decoder the payload of the next frame. All entries of the last one must have been taken.
func (d *Decoder) Feed(payload []byte) { d.p = payload }

// More says whether the frame holds another entry.
func (d *Decoder) More() bool { return len(d.p) > 0 }

// Next decodes an entry. After an error the decoder is of no more use.
func (d *Decoder) Next(e *Entry) (err error) {
	defer func() {
		switch r := recover().(type) {
		case nil:
		case bad:
			err = fmt.Errorf("%w: %s", ErrFormat, string(r))
		default:
			panic(r)
		}
	}()
	*e = Entry{}
	tag := d.byte()
	if tag>>posShift > posFull || tag&tagMask >= numTags {
		d.fail("tag %#x", tag)
	}
	e.Pos = d.position(tag >> posShift)
	switch t := tag & tagMask; t {
	case tagSample:
		e.Kind, e.Time = Sample, d.time()
	case tagStop:
		e.Kind = Stop
		e.Stop = vmm.Stop{Count: e.Pos.Count, RIP: d.uvarint(), RCX: d.uvarint()}
		e.Stop.Regs = binary.LittleEndian.Uint64(d.bytes(8))
	case tagClosed, tagHere:
		e.Kind = Closed
		if t == tagHere {
			e.Kind = Here
		}
		n := d.uvarint()
		if n > MaxChecks {
			d.fail("a mark of %d exits", n)
		}
		e.Checks = unpackChecks(d.bytes((n*7+7)/8), int(n))
		copy(e.Sum[:], d.bytes(uint64(len(e.Sum))))
	case tagScrub:
		e.Kind, e.Piece = Scrub, d.uvarint()
		copy(e.Sum[:], d.bytes(uint64(len(e.Sum))))
	case tagRecord:
		e.Kind = Record
		e.Exit = vmm.ExitRecord{Pos: e.Pos, Kind: vmm.ExitKind(d.byte()), Size: int(d.byte()), Addr: d.uvarint(), Data: d.uvarint()}
		changed := d.uvarint()
		if changed>>numRegs != 0 {
			d.fail("registers %#x", changed)
		}
		for i := range d.s.regs {
			if changed&(1<<i) != 0 {
				d.s.regs[i] ^= d.uvarint()
			}
		}
		e.Regs = regsFrom(d.s.regs)
	case tagEnd:
		e.Kind = End
		e.End.Reason = vmm.ExitReason(d.data(maxDetail))
		code := d.uvarint()
		if code > math.MaxUint32 {
			d.fail("exit code %d", code)
		}
		e.End.Code = uint32(code)
		e.End.Detail = string(d.data(maxDetail))
	default:
		e.Kind = Input
		d.input(&e.Input, tagInputs[t])
	}
	return nil
}

func (d *Decoder) input(in *vmm.Input, kind vmm.InputKind) {
	in.Kind = kind
	switch kind {
	case vmm.InputTime:
		in.Time = d.time()
	case vmm.InputDisk:
		in.Device = d.device()
		d.s.tag += uint64(d.varint())
		in.Tag = d.s.tag
		in.Status = d.byte()
		in.Data = d.data(MaxData)
	case vmm.InputFrame, vmm.InputConsole:
		in.Device = d.device()
		in.Data = d.data(MaxData)
	case vmm.InputLink:
		in.Device = d.device()
		in.Up = d.byte() != 0
	case vmm.InputEntropy:
		in.Tag = d.uvarint()
		in.Data = d.data(MaxData)
	}
}
