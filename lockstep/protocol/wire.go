package protocol

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
)

// On the wire a message is one head byte and the fields that its type has, in the order of the
// comments at the types. There is no version: the link has agreed on one.
//
//	head  bits 0..4 type, 5..6 sender, 7 Tainted of an Ack, Last of CutPages
//
// Numbers are uvarints in their shortest form, nonces and digests are as long as they are, and Data at
// the end of a message is all that is left. Exits count on from the point before, so that
// the points of a log mostly take a byte. An item of a log is
//
//	flags   itemMark, itemTainted, itemRound
//	exit    since that of the item before (modulo 2^64)
//	round   if itemRound
//	digest  of a watermark; of an entry length and data
//
// Every message has one encoding, and a decoder takes no other: what it has taken encodes to the
// same bytes.
const (
	headType  = 0x1f
	headFrom  = 5
	headSides = 3
	headFlag  = 0x80

	itemMark    = 1 << 0
	itemTainted = 1 << 1
	itemRound   = 1 << 2
	itemFlags   = itemMark | itemTainted | itemRound
)

// Limits of an encoded message.
const (
	// MaxMessage bounds a message, in bytes: the link's MaxLogMessage. What goes by the bulk class has
	// to keep to the smaller bound of that.
	MaxMessage = 8 << 20
	// MaxCut bounds a message of any type, in bytes. A cut of a large guest has many hashes; the shell sends such a message
	// in pieces.
	MaxCut = 512 << 20
	// MaxItems bounds the items of a Log: those of MaxMessage bytes by the node's own reckoning.
	MaxItems = MaxMessage / itemSize
	// MaxOutputs bounds the outputs that a CutState carries: the default gate full of single bytes.
	MaxOutputs = 1 << 20

	// The shortest item, an empty entry: flags, exit, length.
	minItem = 3
	// The shortest output: seq, exit, round, length.
	minOutput = 4
	// The longest head of an item or an output: flags or seq, exit, round, length.
	maxItemHead = 4 * binary.MaxVarintLen64
	// All fixed fields of any type, with room to spare.
	maxFixed = 16 * binary.MaxVarintLen64
)

// ErrMessage reports bytes that are no message.
var ErrMessage = errors.New("protocol: malformed message")

// Append appends the encoding of m to b. Fields that the type does not use are left out, and so are the
// Data of a watermark and the taint of an entry. A message of no known type or sender, or beyond the
// limits, has an encoding that DecodeMessage refuses; see [Message.Split] for a long log.
func (m *Message) Append(b []byte) []byte {
	b = slices.Grow(b, m.bound())
	var head uint8 // 0 is refused
	if m.Type <= headType && m.From <= headSides {
		head = uint8(m.Type) | uint8(m.From)<<headFrom
	}
	if m.Type == MsgAck && m.Tainted || m.Type == MsgCutPages && m.Last {
		head |= headFlag
	}
	b = append(b, head)
	switch m.Type {
	case MsgHello:
		b = binary.AppendUvarint(append(b, uint8(m.Phase)), m.Epoch)
	case MsgJoin:
		b = binary.AppendUvarint(b, m.Epoch)
	case MsgChunk:
		b = append(b, m.Data...)
	case MsgLog:
		b = binary.AppendUvarint(b, m.Term)
		b = appendItems(b, m.Items)
	case MsgAck:
		b = binary.AppendUvarint(b, m.Term)
		b = appendPoint(b, m.Received, 0)
		// These are behind it, if they differ.
		b = binary.AppendUvarint(b, m.Received.Exit-m.Executed.Exit)
		b = binary.AppendUvarint(b, uint64(m.Executed.Round))
		b = binary.AppendUvarint(b, m.Executed.Exit-m.Clean.Exit)
		b = binary.AppendUvarint(b, uint64(m.Clean.Round))
	case MsgReleased:
		b = binary.AppendUvarint(b, m.Seq)
	case MsgDiverged:
		b = appendPoint(binary.AppendUvarint(b, m.Term), m.Point, 0)
		b = append(b, m.Digest[:]...)
	case MsgCutAsk, MsgCutAck:
		b = binary.AppendUvarint(b, m.Term)
	case MsgCutDirty, MsgCutWant, MsgCutPages:
		b = append(binary.AppendUvarint(b, m.Term), m.Data...)
	case MsgCutState:
		b = binary.AppendUvarint(b, m.Term)
		b = binary.AppendUvarint(b, m.Seq)
		b = appendOutputs(b, m.Outputs)
		b = append(b, m.Data...)
	case MsgInSync, MsgHandOver:
		b = binary.AppendUvarint(b, m.Record.Epoch)
		b = append(b, uint8(m.Record.InSync), uint8(m.Record.Primary))
		b = binary.LittleEndian.AppendUint64(b, m.Record.Nonce)
	}
	return b
}

// bound returns a length that the encoding does not exceed.
func (m *Message) bound() int {
	n := maxFixed
	switch m.Type {
	case MsgLog:
		for i := range m.Items {
			n += m.Items[i].bound()
		}
	case MsgCutState:
		for i := range m.Outputs {
			n += maxItemHead + len(m.Outputs[i].Data)
		}
		n += len(m.Data)
	case MsgChunk, MsgCutDirty, MsgCutWant, MsgCutPages:
		n += len(m.Data)
	}
	return n
}

func (i *Item) bound() int {
	if i.Mark {
		return maxItemHead + len(i.Digest)
	}
	return maxItemHead + len(i.Data)
}

// Split returns a log in messages whose encodings have at most limit bytes and MaxItems items, as slices of
// m.Items; another message, or a log that is short enough, comes back alone. The node takes a log in any
// pieces. An item too long for limit has a message of its own.
func (m *Message) Split(limit int) []Message {
	if m.Type != MsgLog || m.bound() <= limit && len(m.Items) <= MaxItems {
		return []Message{*m}
	}
	var parts []Message
	for rest := m.Items; len(rest) > 0; {
		n, size := 1, maxFixed+rest[0].bound()
		for n < len(rest) && n < MaxItems && size+rest[n].bound() <= limit {
			size += rest[n].bound()
			n++
		}
		part := *m
		part.Items, rest = rest[:n:n], rest[n:]
		parts = append(parts, part)
	}
	return parts
}

// appendPoint appends a point whose exit counts from base.
func appendPoint(b []byte, p Point, base uint64) []byte {
	return binary.AppendUvarint(binary.AppendUvarint(b, p.Exit-base), uint64(p.Round))
}

func appendItems(b []byte, items []Item) []byte {
	b = binary.AppendUvarint(b, uint64(len(items)))
	var exit uint64
	for k := range items {
		i := &items[k]
		var flags uint8
		if i.Mark {
			flags |= itemMark
			if i.Tainted {
				flags |= itemTainted
			}
		}
		if i.Point.Round != 0 {
			flags |= itemRound
		}
		b = binary.AppendUvarint(append(b, flags), i.Point.Exit-exit)
		exit = i.Point.Exit
		if i.Point.Round != 0 {
			b = binary.AppendUvarint(b, uint64(i.Point.Round))
		}
		if i.Mark {
			b = append(b, i.Digest[:]...)
		} else {
			b = append(binary.AppendUvarint(b, uint64(len(i.Data))), i.Data...)
		}
	}
	return b
}

// appendOutputs appends outputs; seq and exit count on from the output before.
func appendOutputs(b []byte, outputs []Output) []byte {
	b = binary.AppendUvarint(b, uint64(len(outputs)))
	var seq, exit uint64
	for k := range outputs {
		o := &outputs[k]
		b = binary.AppendUvarint(b, o.Seq-seq)
		b = appendPoint(b, o.Point, exit)
		seq, exit = o.Seq, o.Point.Exit
		b = append(binary.AppendUvarint(b, uint64(len(o.Data))), o.Data...)
	}
	return b
}

// DecodeMessage decodes what [Message.Append] has encoded, all of b. Data, Item.Data and Output.Data
// alias b. It does not judge whether a message makes sense where it arrives: [Node.Step] does. Errors
// wrap ErrMessage.
func DecodeMessage(b []byte) (Message, error) {
	d := decoder{p: b}
	if len(b) > MaxCut {
		d.fail("%d bytes, at most %d are allowed", len(b), MaxCut)
	}
	head := d.byte()
	m := Message{Type: Type(head & headType), From: Side(head >> headFrom & headSides)}
	if m.From != A && m.From != B {
		d.fail("from side %d", uint8(m.From))
	}
	flag := head&headFlag != 0
	if flag && m.Type != MsgAck && m.Type != MsgCutPages {
		d.fail("%v with head %#x", m.Type, head)
	}
	switch m.Type {
	case MsgHello:
		if m.Phase = Phase(d.byte()); m.Phase > Switching {
			d.fail("%v", m.Phase)
		}
		m.Epoch = d.uvarint()
	case MsgHeartbeat, MsgReady:
	case MsgJoin:
		m.Epoch = d.uvarint()
	case MsgChunk:
		m.Data = d.rest()
	case MsgLog:
		m.Term = d.uvarint()
		m.Items = d.items()
	case MsgAck:
		m.Tainted = flag
		m.Term = d.uvarint()
		m.Received = d.point(0)
		m.Executed.Exit = m.Received.Exit - d.uvarint()
		m.Executed.Round = d.uint32()
		m.Clean.Exit = m.Executed.Exit - d.uvarint()
		m.Clean.Round = d.uint32()
	case MsgReleased:
		m.Seq = d.uvarint()
	case MsgDiverged:
		m.Term = d.uvarint()
		m.Point = d.point(0)
		d.copy(m.Digest[:])
	case MsgCutAsk, MsgCutAck:
		m.Term = d.uvarint()
	case MsgCutDirty, MsgCutWant:
		m.Term = d.uvarint()
		m.Data = d.rest()
	case MsgCutPages:
		m.Last = flag
		m.Term = d.uvarint()
		m.Data = d.rest()
	case MsgCutState:
		m.Term = d.uvarint()
		m.Seq = d.uvarint()
		m.Outputs = d.outputs()
		m.Data = d.rest()
	case MsgInSync, MsgHandOver:
		m.Record = d.record()
	default:
		d.fail("unknown %v", m.Type)
	}
	if d.err == nil && len(d.p) > 0 {
		d.fail("%d bytes behind the end of %v", len(d.p), m.Type)
	}
	if d.err != nil {
		return Message{}, d.err
	}
	return m, nil
}

// decoder takes values off p. After the first error it returns zeros, and nothing is left.
type decoder struct {
	p   []byte
	err error
}

func (d *decoder) fail(format string, args ...any) {
	if d.err == nil {
		d.err = fmt.Errorf("%w: %s", ErrMessage, fmt.Sprintf(format, args...))
	}
	d.p = nil
}

func (d *decoder) byte() uint8 {
	if len(d.p) == 0 {
		d.fail("cut short")
		return 0
	}
	v := d.p[0]
	d.p = d.p[1:]
	return v
}

func (d *decoder) uvarint() uint64 {
	v, n := binary.Uvarint(d.p)
	if n <= 0 || n > 1 && d.p[n-1] == 0 {
		d.fail("a number that is cut short or too long")
		return 0
	}
	d.p = d.p[n:]
	return v
}

func (d *decoder) uint32() uint32 {
	v := d.uvarint()
	if v > math.MaxUint32 {
		d.fail("round %d", v)
		return 0
	}
	return uint32(v)
}

func (d *decoder) point(base uint64) Point {
	return Point{Exit: base + d.uvarint(), Round: d.uint32()}
}

func (d *decoder) copy(to []byte) {
	if len(to) > len(d.p) {
		d.fail("cut short")
		return
	}
	copy(to, d.p)
	d.p = d.p[len(to):]
}

// data takes a length and so many bytes; none are nil.
func (d *decoder) data() []byte {
	n := d.uvarint()
	if n > uint64(len(d.p)) {
		d.fail("%d bytes of data where %d are left", n, len(d.p))
		return nil
	}
	v := d.p[:n:n]
	d.p = d.p[n:]
	if n == 0 {
		return nil
	}
	return v
}

// rest takes all that is left.
func (d *decoder) rest() []byte {
	v := d.p[:len(d.p):len(d.p)]
	d.p = nil
	if len(v) == 0 {
		return nil
	}
	return v
}

// count takes the number of things that follow, of at least size bytes each.
func (d *decoder) count(limit, size int, what string) int {
	n := d.uvarint()
	if n > uint64(limit) || n > uint64(len(d.p)/size) {
		d.fail("%d %s in %d bytes", n, what, len(d.p))
		return 0
	}
	return int(n)
}

func (d *decoder) items() []Item {
	n := d.count(MaxItems, minItem, "items")
	if n == 0 {
		return nil
	}
	items := make([]Item, n)
	var exit uint64
	for k := range items {
		i := &items[k]
		flags := d.byte()
		if flags&^itemFlags != 0 || flags&itemTainted != 0 && flags&itemMark == 0 {
			d.fail("an item with flags %#x", flags)
		}
		exit += d.uvarint()
		i.Point.Exit = exit
		if flags&itemRound != 0 {
			if i.Point.Round = d.uint32(); i.Point.Round == 0 {
				d.fail("round 0 of an item that has one")
			}
		}
		if i.Mark = flags&itemMark != 0; i.Mark {
			i.Tainted = flags&itemTainted != 0
			d.copy(i.Digest[:])
		} else {
			i.Data = d.data()
		}
		if d.err != nil {
			return nil
		}
	}
	return items
}

func (d *decoder) outputs() []Output {
	n := d.count(MaxOutputs, minOutput, "outputs")
	if n == 0 {
		return nil
	}
	outputs := make([]Output, n)
	var seq, exit uint64
	for k := range outputs {
		o := &outputs[k]
		seq += d.uvarint()
		o.Seq, o.Point = seq, d.point(exit)
		exit = o.Point.Exit
		o.Data = d.data()
		if d.err != nil {
			return nil
		}
	}
	return outputs
}

func (d *decoder) record() Record {
	r := Record{Epoch: d.uvarint(), InSync: Sides(d.byte()), Primary: Side(d.byte())}
	if r.InSync&^Both != 0 {
		d.fail("a record with sides %#x", uint8(r.InSync))
	}
	if r.Primary > B {
		d.fail("a record with primary %d", uint8(r.Primary))
	}
	var nonce [8]byte
	d.copy(nonce[:])
	r.Nonce = binary.LittleEndian.Uint64(nonce[:])
	return r
}
