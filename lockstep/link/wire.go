package link

import (
	"encoding/binary"
	"fmt"
)

// Side is one of the two members of a pair.
type Side uint8

// The sides. The values are part of the protocol.
const (
	A Side = 1
	B Side = 2
)

// Other returns the peer of a side.
func (s Side) Other() Side { return A + B - s }

// String returns "a" or "b".
func (s Side) String() string {
	switch s {
	case A:
		return "a"
	case B:
		return "b"
	}
	return fmt.Sprintf("side %d", uint8(s))
}

// Class is a class of traffic.
type Class uint8

// The classes of messages. The values are part of the protocol.
const (
	Log     Class = iota // small and urgent
	Bulk                 // large and patient
	control              // the link's own
)

// classes is how many classes of messages there are.
const classes = 2

// String returns the class's name.
func (c Class) String() string {
	switch c {
	case Log:
		return "log"
	case Bulk:
		return "bulk"
	case control:
		return "control"
	}
	return fmt.Sprintf("class %d", uint8(c))
}

// Versions of the protocol that this program speaks.
const (
	MinVersion = 1
	MaxVersion = 1
)

// Limits.
const (
	// MaxPaths is the largest number of networks between the hosts.
	MaxPaths = 2
	// MaxLogMessage and MaxBulkMessage bound one message's payload, in bytes.
	MaxLogMessage  = 8 << 20
	MaxBulkMessage = 4 << 20

	headerSize = 16
	// maxRecord is the plaintext of one TLS record (RFC 8446, 5.1), and the largest write.
	maxRecord = 16 << 10
	// maxSegment is the largest payload of a segment: with its header it fills a record.
	maxSegment = maxRecord - headerSize
	maxHello   = 512
	maxReason  = 64
	maxText    = 256
	maxRefusal = 2 + maxReason + maxText
	beatSize   = 8 + 8*classes
	maxBye     = maxText
)

// kind says what a frame is.
type kind uint8

// The kinds of frame. The values are part of the protocol.
const (
	kindHello   kind = iota + 1 // dialling side, first on every connection
	kindWelcome                 // listening side: the answer
	kindRefusal                 // or this, and the end
	kindSegment                 // a piece of a message
	kindPing                    // are you there? carries the sender's clock and acknowledgements
	kindPong                    // yes; the ping's clock, and acknowledgements
	kindAck                     // acknowledgements
	kindBye                     // the session is over on purpose
)

// limits bounds the payload of each kind.
var limits = [...]uint32{
	kindHello: maxHello, kindWelcome: maxHello, kindRefusal: maxRefusal, kindSegment: maxSegment,
	kindPing: beatSize, kindPong: beatSize, kindAck: beatSize, kindBye: maxBye,
}

// flagMore says that the message goes on in the next segment.
const flagMore = 1

// header begins every frame:
//
//	length  4 bytes, little-endian, of the payload
//	kind    1 byte
//	flags   1 byte
//	zero    2 bytes
//	offset  8 bytes, little-endian: of a segment in its class's stream, which counts headers too; else zero
type header struct {
	length uint32
	kind   kind
	flags  uint8
	offset uint64
}

func (h header) put(b []byte) {
	binary.LittleEndian.PutUint32(b, h.length)
	b[4], b[5], b[6], b[7] = byte(h.kind), h.flags, 0, 0
	binary.LittleEndian.PutUint64(b[8:], h.offset)
}

// parseHeader decodes and checks a header; b has headerSize bytes.
func parseHeader(b []byte) (header, *Error) {
	h := header{binary.LittleEndian.Uint32(b), kind(b[4]), b[5], binary.LittleEndian.Uint64(b[8:])}
	switch {
	case h.kind == 0 || int(h.kind) >= len(limits):
		return h, refuse(Garbage, "a frame of unknown kind %d", h.kind)
	case b[6] != 0 || b[7] != 0 || h.flags&^flagMore != 0:
		return h, refuse(Garbage, "reserved bits are set in the header of a frame")
	case h.kind != kindSegment && (h.flags != 0 || h.offset != 0):
		return h, refuse(Garbage, "a frame of kind %d with a segment's header", h.kind)
	case h.length > limits[h.kind]:
		return h, refuse(Oversized, "a frame of kind %d with %d bytes; at most %d are allowed", h.kind, h.length, limits[h.kind])
	case h.kind == kindSegment && h.flags&flagMore != 0 && h.length != maxSegment:
		// Only full segments go on: an endless chain of empty ones would be work without progress.
		return h, refuse(Garbage, "a segment of %d bytes that is not the last of its message", h.length)
	}
	return h, nil
}

// appendFrame appends a frame that is no segment.
func appendFrame(b []byte, k kind, payload []byte) []byte {
	var h [headerSize]byte
	header{length: uint32(len(payload)), kind: k}.put(h[:])
	return append(append(b, h[:]...), payload...)
}

// magic begins a hello and a welcome.
const magic = "FTVMMLNK"

// nonce names a session: 16 random bytes from each side.
type nonce [16]byte

// hello is the first message of each side on each connection. Magic and versions stay where they
// are in all versions of the protocol:
//
//	magic         8 bytes
//	min, max      2 bytes each, little-endian as all numbers; of a welcome both are the version chosen
//	pair         32 bytes, the pair's fingerprint
//	side          1 byte, of the sender
//	class, path   1 byte each, of this connection
//	zero          1 byte
//	capabilities  8 bytes
//	epoch, term   8 bytes each, for the protocol above
//	session      16 bytes, drawn by the dialling side
//	peer         16 bytes, drawn by the listening side; zero in a hello that asks for a new session
//
// A later version may append fields; this one ignores them.
type hello struct {
	min, max     uint16
	pair         Fingerprint
	side         Side
	class        Class
	path         uint8
	capabilities uint64
	epoch, term  uint64
	session      nonce
	peer         nonce
}

const (
	helloFixed = len(magic) + 4
	helloSize  = helloFixed + 32 + 4 + 3*8 + 2*16
)

func (h *hello) append(b []byte) []byte {
	le := binary.LittleEndian
	b = append(b, magic...)
	b = le.AppendUint16(b, h.min)
	b = le.AppendUint16(b, h.max)
	b = append(b, h.pair[:]...)
	b = append(b, byte(h.side), byte(h.class), h.path, 0)
	b = le.AppendUint64(b, h.capabilities)
	b = le.AppendUint64(b, h.epoch)
	b = le.AppendUint64(b, h.term)
	b = append(b, h.session[:]...)
	return append(b, h.peer[:]...)
}

// parseHello decodes a hello or a welcome. ours is the range of versions that this side speaks.
func parseHello(b []byte, ours [2]uint16) (hello, *Error) {
	var h hello
	if len(b) < helloFixed || string(b[:len(magic)]) != magic {
		return h, refuse(BadHello, "the peer's first message is no hello")
	}
	le := binary.LittleEndian
	h.min, h.max = le.Uint16(b[8:]), le.Uint16(b[10:])
	if h.min > h.max {
		return h, refuse(BadHello, "the peer's hello has an empty range of versions, %d to %d", h.min, h.max)
	}
	// Before all else: what follows may look different in another version.
	if _, err := commonVersion(ours, [2]uint16{h.min, h.max}); err != nil {
		return h, err
	}
	if len(b) < helloSize {
		return h, refuse(BadHello, "the peer's hello has %d bytes instead of %d", len(b), helloSize)
	}
	b = b[helloFixed:]
	copy(h.pair[:], b)
	b = b[32:]
	h.side, h.class, h.path = Side(b[0]), Class(b[1]), b[2]
	h.capabilities, h.epoch, h.term = le.Uint64(b[4:]), le.Uint64(b[12:]), le.Uint64(b[20:])
	copy(h.session[:], b[28:])
	copy(h.peer[:], b[44:])
	switch {
	case h.side != A && h.side != B:
		return h, refuse(BadHello, "the peer's hello names %v", h.side)
	case h.class > control:
		return h, refuse(BadHello, "the peer's hello names %v", h.class)
	case h.path >= MaxPaths:
		return h, refuse(BadHello, "the peer's hello names path %d", h.path)
	case h.session == nonce{}:
		return h, refuse(BadHello, "the peer's hello names no session")
	}
	return h, nil
}

// commonVersion returns the highest version in both ranges.
func commonVersion(a, b [2]uint16) (uint16, *Error) {
	low, high := max(a[0], b[0]), min(a[1], b[1])
	if low > high {
		return 0, refuse(WrongVersion, "this side speaks versions %d to %d of the link's protocol, the peer %d to %d", a[0], a[1], b[0], b[1])
	}
	return high, nil
}

// refusal is the listening side's other answer: the length of the reason (2 bytes), reason, text.
func appendRefusal(b []byte, e *Error) []byte {
	reason, text := clip(string(e.Reason), maxReason), clip(e.Err.Error(), maxText)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(reason)))
	return append(append(b, reason...), text...)
}

func parseRefusal(b []byte) (*Error, *Error) {
	if len(b) < 2 {
		return nil, refuse(BadHello, "the peer's refusal is too short")
	}
	n := int(binary.LittleEndian.Uint16(b))
	if b = b[2:]; n > len(b) || n > maxReason || len(b)-n > maxText {
		return nil, refuse(BadHello, "the peer's refusal is malformed")
	}
	return &Error{Reason: Reason(printable(b[:n])), ByPeer: true, Err: fmt.Errorf("%s", printable(b[n:]))}, nil
}

// beat is the payload of ping, pong and ack: a clock and how far each class has been taken.
type beat struct {
	clock uint64
	taken [classes]uint64
}

func (m *beat) put(b []byte) {
	binary.LittleEndian.PutUint64(b, m.clock)
	for i, t := range m.taken {
		binary.LittleEndian.PutUint64(b[8+8*i:], t)
	}
}

func parseBeat(b []byte) (beat, *Error) {
	var m beat
	if len(b) != beatSize {
		return m, refuse(Garbage, "a heartbeat of %d bytes instead of %d", len(b), beatSize)
	}
	m.clock = binary.LittleEndian.Uint64(b)
	for i := range m.taken {
		m.taken[i] = binary.LittleEndian.Uint64(b[8+8*i:])
	}
	return m, nil
}

func clip(s string, n int) string { return s[:min(len(s), n)] }

// printable makes a peer's text fit for a log.
func printable(b []byte) string {
	out := make([]byte, len(b))
	for i, c := range b {
		if c < ' ' || c > '~' {
			c = '?'
		}
		out[i] = c
	}
	return string(out)
}
