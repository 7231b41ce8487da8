package link

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// listen makes a listener of side a with these keys, with its events.
func listen(t testing.TB, c Config) (*Listener, *events) {
	e := newEvents()
	c.Event = e.add
	l, err := Listen(c, "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, l.Close()) })
	return l, e
}

// works shows that a listener takes the right peer after whatever was done to it.
func works(t testing.TB, l *Listener, keys *Keys, change func(*Config)) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c := Config{Keys: keys}
	if change != nil {
		change(&c)
	}
	b, err := Dial(ctx, c, addressesOf(l)...)
	require.NoError(t, err)
	a, err := l.Accept(ctx)
	require.NoError(t, err)
	b.Close("")
	a.Close("")
	a.wg.Wait()
	b.wg.Wait()
}

func TestWhoDoesNotBelongIsRefused(t *testing.T) {
	a, b := pairKeys(t, "db")
	_, otherB := pairKeys(t, "db")
	_, web := pairKeys(t, "web")
	at := func(d time.Duration) func() time.Time { return func() time.Time { return time.Now().Add(d) } }
	cases := []struct {
		name       string
		listen     Config
		dial       Config
		atListener Reason // "" if it sees nothing wrong
		atDialler  Reason
	}{
		{"another pair's certificate", Config{Keys: a}, Config{Keys: web}, RefusedByPeer, WrongPair},
		{"another pair of the same name", Config{Keys: a}, Config{Keys: otherB}, RefusedByPeer, Untrusted},
		{"the same side", Config{Keys: a}, Config{Keys: a}, RefusedByPeer, SameSide},
		{"a dialler whose clock is before its time", Config{Keys: a}, Config{Keys: b, Now: at(-2 * backdate)}, RefusedByPeer, NotYetValid},
		{"a dialler whose clock is after its time", Config{Keys: a}, Config{Keys: b, Now: at(lifetime + time.Hour)}, RefusedByPeer, Expired},
		{"a listener whose clock is before its time", Config{Keys: a, Now: at(-2 * backdate)}, Config{Keys: b}, NotYetValid, RefusedByPeer},
		{"a listener whose clock is after its time", Config{Keys: a, Now: at(lifetime + time.Hour)}, Config{Keys: b}, Expired, RefusedByPeer},
		{"a newer protocol", Config{Keys: a, versions: [2]uint16{1, 2}}, Config{Keys: b, versions: [2]uint16{3, 4}}, WrongVersion, WrongVersion},
		{"an older protocol", Config{Keys: a, versions: [2]uint16{5, 6}}, Config{Keys: b, versions: [2]uint16{3, 4}}, WrongVersion, WrongVersion},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			l, le := listen(t, c.listen)
			de := newEvents()
			c.dial.Event = de.add
			_, err := Dial(t.Context(), c.dial, addressesOf(l)...)
			require.Equal(t, c.atDialler, ReasonOf(err), "%v", err)
			require.Equal(t, c.atDialler, de.kind(t, EventRefused).Reason)
			e := le.kind(t, EventRefused)
			require.Equal(t, c.atListener, e.Reason, e.Text)
			if c.listen.Now == nil { // else nobody can be right
				works(t, l, b, func(k *Config) { k.versions = c.listen.versions })
			}
		})
	}
}

func TestClocksThatDisagreeByAWeekDoNoHarm(t *testing.T) {
	a, b := pairKeys(t, "db")
	l, _ := listen(t, Config{Keys: a})
	works(t, l, b, func(c *Config) { c.Now = func() time.Time { return time.Now().Add(-7 * 24 * time.Hour) } })
}

func TestAStrangerWithoutRightKeysIsRefused(t *testing.T) {
	a, b := pairKeys(t, "db")
	_, stranger := pairKeys(t, "db")
	for _, c := range []struct {
		name   string
		reason Reason
		do     func(t *testing.T, c net.Conn)
	}{
		{"no TLS", NotTLS, func(t *testing.T, c net.Conn) {
			_, err := c.Write([]byte("GET / HTTP/1.1\r\n\r\n"))
			require.NoError(t, err)
		}},
		{"nothing, and the end", NotTLS, func(t *testing.T, c net.Conn) { c.Close() }},
		{"no certificate", NotTLS, func(t *testing.T, c net.Conn) {
			cfg := b.config(time.Now)
			cfg.Certificates = nil
			k := tls.Client(c, cfg)
			_ = k.Handshake()
			_, err := k.Read(make([]byte, 1))
			require.Error(t, err)
		}},
		{"TLS 1.2", NotTLS, func(t *testing.T, c net.Conn) {
			cfg := b.config(time.Now)
			cfg.MinVersion, cfg.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
			require.Error(t, tls.Client(c, cfg).Handshake())
		}},
		{"a certificate of another authority", Untrusted, func(t *testing.T, c net.Conn) {
			cfg := stranger.config(time.Now)
			cfg.VerifyConnection = nil
			k := tls.Client(c, cfg)
			_ = k.Handshake()
			_, err := k.Read(make([]byte, 1))
			require.Error(t, err)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, e := listen(t, Config{Keys: a})
			conn, err := net.Dial("tcp", addressesOf(l)[0])
			require.NoError(t, err)
			defer conn.Close()
			c.do(t, conn)
			got := e.kind(t, EventRefused)
			require.Equal(t, c.reason, got.Reason, got.Text)
			works(t, l, b, nil)
		})
	}
}

func TestWhoSaysNothingIsSentAwayInTime(t *testing.T) {
	a, b := pairKeys(t, "db")
	l, e := listen(t, Config{Keys: a, HandshakeTimeout: 50 * time.Millisecond})
	c, err := net.Dial("tcp", addressesOf(l)[0])
	require.NoError(t, err)
	defer c.Close()
	_, err = c.Read(make([]byte, 1))
	require.Error(t, err)
	require.Equal(t, HandshakeTimedOut, e.kind(t, EventRefused).Reason)
	// The right keys, and then silence.
	k := tls.Client(mustDial(t, l), b.config(time.Now))
	defer k.NetConn().Close()
	e.forget()
	_ = k.Handshake()
	_, _ = io.Copy(io.Discard, k) // to the end, or an alert: which is a matter of time
	require.Equal(t, HandshakeTimedOut, e.kind(t, EventRefused).Reason)
}

func TestTooManyStrangersAreRefusedAndHarmNobody(t *testing.T) {
	a, b := pairKeys(t, "db")
	l, e := listen(t, Config{Keys: a})
	var idle []net.Conn
	for range maxHandshakes + 1 {
		idle = append(idle, mustDial(t, l))
	}
	require.Equal(t, Busy, e.kind(t, EventRefused).Reason)
	for _, c := range idle {
		c.Close()
	}
	require.Eventually(t, func() bool { return len(l.slots) == 0 }, patience, time.Millisecond)
	works(t, l, b, nil)
}

func mustDial(t testing.TB, l *Listener) net.Conn {
	c, err := net.Dial("tcp", addressesOf(l)[0])
	require.NoError(t, err)
	return c
}

// hostile is a peer that holds the right keys, and says what the test wants.
type hostile struct {
	*tls.Conn
	t testing.TB
	f frameReader
}

func newHostile(t testing.TB, l *Listener, keys *Keys) *hostile {
	k := tls.Client(mustDial(t, l), keys.config(time.Now))
	t.Cleanup(func() { k.NetConn().Close() })
	require.NoError(t, k.Handshake())
	return &hostile{k, t, frameReader{r: k, buf: make([]byte, 2*maxRecord)}}
}

func (h *hostile) say(k kind, payload []byte) *hostile {
	_, err := h.Write(appendFrame(nil, k, payload))
	require.NoError(h.t, err)
	return h
}

func (h *hostile) hear() (kind, []byte) {
	f, p, err := h.f.next()
	if err != nil {
		return 0, nil
	}
	return f.kind, p
}

func goodHello(keys *Keys) hello {
	return hello{min: 1, max: 1, pair: keys.Fingerprint, side: keys.Side, class: control, session: nonce{1}}
}

func TestABadHelloIsRefusedWithItsReason(t *testing.T) {
	a, b := pairKeys(t, "db")
	change := func(f func(*hello)) []byte {
		h := goodHello(b)
		f(&h)
		return h.append(nil)
	}
	for _, c := range []struct {
		name   string
		reason Reason
		kind   kind
		hello  []byte
	}{
		{"no hello", BadHello, kindPing, make([]byte, beatSize)},
		{"empty", BadHello, kindHello, nil},
		{"wrong magic", BadHello, kindHello, append([]byte("NOTMAGIC"), change(func(*hello) {})[8:]...)},
		{"short", BadHello, kindHello, change(func(*hello) {})[:helloSize-1]},
		{"empty range of versions", BadHello, kindHello, change(func(h *hello) { h.min, h.max = 2, 1 })},
		{"no common version", WrongVersion, kindHello, change(func(h *hello) { h.min, h.max = 9, 12 })},
		{"no common version, and the rest unknown", WrongVersion, kindHello, change(func(h *hello) { h.min, h.max = 9, 12 })[:helloFixed]},
		{"side of nobody", BadHello, kindHello, change(func(h *hello) { h.side = 3 })},
		{"side of the other", BadHello, kindHello, change(func(h *hello) { h.side = A })},
		{"unknown class", BadHello, kindHello, change(func(h *hello) { h.class = 3 })},
		{"unknown path", BadHello, kindHello, change(func(h *hello) { h.path = MaxPaths })},
		{"no session", BadHello, kindHello, change(func(h *hello) { h.session = nonce{} })},
		{"another pair than the certificate's", WrongPair, kindHello, change(func(h *hello) { h.pair[3]++ })},
		{"log of a session that is not there", UnknownSession, kindHello, change(func(h *hello) { h.class = Log })},
		{"path of a session that is over", UnknownSession, kindHello, change(func(h *hello) { h.peer = nonce{9} })},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, e := listen(t, Config{Keys: a})
			k, p := newHostile(t, l, b).say(c.kind, c.hello).hear()
			require.Equal(t, kindRefusal, k)
			told, bad := parseRefusal(p)
			require.Nil(t, bad)
			require.Equal(t, c.reason, told.Reason)
			got := e.kind(t, EventRefused)
			require.Equal(t, c.reason, got.Reason, got.Text)
			works(t, l, b, nil)
		})
	}
}

// intrude has a hostile peer begin a session properly. It returns its connections and the victim.
func intrude(t testing.TB, l *Listener, keys *Keys) (conns [control + 1]*hostile, victim *Session) {
	h := goodHello(keys)
	for _, class := range []Class{control, Log, Bulk} {
		h.class = class
		c := newHostile(t, l, keys).say(kindHello, h.append(nil))
		k, p := c.hear()
		require.Equal(t, kindWelcome, k)
		w, err := parseHello(p, [2]uint16{1, 1})
		require.Nil(t, err)
		h.peer = w.peer
		conns[class] = c
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s, err := l.Accept(ctx)
	require.NoError(t, err)
	t.Cleanup(func() { s.Close(""); s.wg.Wait() })
	return conns, s
}

// segment encodes a segment.
func segment(offset uint64, more bool, payload []byte) []byte {
	h := header{length: uint32(len(payload)), kind: kindSegment, offset: offset}
	if more {
		h.flags = flagMore
	}
	b := make([]byte, headerSize)
	h.put(b)
	return append(b, payload...)
}

func raw(length uint32, k kind, flags, zero byte, offset uint64) []byte {
	b := binary.LittleEndian.AppendUint32(nil, length)
	b = append(b, byte(k), flags, zero, 0)
	return binary.LittleEndian.AppendUint64(b, offset)
}

func TestAPeerWithTheRightKeysThatSpeaksGarbageIsCutOff(t *testing.T) {
	a, b := pairKeys(t, "db")
	beatOf := func(taken uint64) []byte {
		p := make([]byte, beatSize)
		(&beat{clock: 1, taken: [classes]uint64{taken}}).put(p)
		return p
	}
	full := make([]byte, maxSegment)
	for _, c := range []struct {
		name   string
		class  Class
		bytes  []byte
		close  bool
		reason Reason
	}{
		{"zeros", Log, make([]byte, 64), false, Garbage},
		{"text", Bulk, []byte(strings.Repeat("how are you? ", 9)), false, Garbage},
		{"unknown kind", Log, raw(0, 200, 0, 0, 0), false, Garbage},
		{"reserved bits", Log, raw(0, kindSegment, 0, 1, 0), false, Garbage},
		{"unknown flags", Log, raw(0, kindSegment, 0x80, 0, 0), false, Garbage},
		{"length of 4 GiB", Log, raw(1<<32-1, kindSegment, 0, 0, 0), false, Oversized},
		{"length just above the limit", Bulk, raw(maxSegment+1, kindSegment, 0, 0, 0), false, Oversized},
		{"long heartbeat", control, raw(beatSize+1, kindPing, 0, 0, 0), false, Oversized},
		{"short heartbeat", control, appendFrame(nil, kindPing, make([]byte, beatSize-1)), false, Garbage},
		{"segment on control", control, segment(0, false, nil), false, Garbage},
		{"heartbeat on the log", Log, appendFrame(nil, kindPing, beatOf(0)), false, Garbage},
		{"second hello", control, appendFrame(nil, kindHello, (&hello{}).append(nil)), false, Garbage},
		{"gap", Log, segment(16, false, nil), false, OutOfOrder},
		{"overlap", Log, append(segment(0, false, []byte("12345678")), segment(8, false, full[:100])...), false, OutOfOrder},
		{"offset near overflow", Log, segment(1<<64-8, false, []byte("12345678")), false, OutOfOrder},
		{"empty pieces for ever", Log, segment(0, true, nil), false, Garbage},
		{"acknowledges what was not sent", control, appendFrame(nil, kindAck, beatOf(1)), false, OutOfOrder},
		{"truncated header", Log, []byte{1, 2, 3}, true, Truncated},
		{"truncated segment", Log, segment(0, false, full)[:1000], true, Truncated},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, e := listen(t, Config{Keys: a, Suspect: 5 * time.Second, Dead: 10 * time.Second})
			conns, victim := intrude(t, l, b)
			got := 0
			victim.Start(func(Class, []byte) { got++ })
			_, err := conns[c.class].Write(c.bytes)
			require.NoError(t, err)
			if c.close {
				require.NoError(t, conns[c.class].Close())
			}
			down := e.kind(t, EventDown)
			require.Equal(t, c.reason, down.Reason, down.Text)
			require.Equal(t, c.reason, ReasonOf(victim.Err()))
			works(t, l, b, nil)
		})
	}
}

func TestAMessageOfTooManySegmentsIsCutOff(t *testing.T) {
	a, b := pairKeys(t, "db")
	l, e := listen(t, Config{Keys: a, Suspect: 5 * time.Second, Dead: 10 * time.Second})
	conns, victim := intrude(t, l, b)
	victim.Start(func(Class, []byte) { t.Error("half a message was delivered") })
	full := make([]byte, maxSegment)
	for i := uint64(0); ; i++ {
		if _, err := conns[Log].Write(segment(i*maxRecord, true, full)); err != nil {
			break
		}
		require.LessOrEqual(t, i, uint64(2*MaxLogMessage/maxSegment+1000), "nobody stops it")
		if victim.Err() != nil {
			break
		}
	}
	require.Equal(t, Oversized, e.kind(t, EventDown).Reason)
	require.LessOrEqual(t, cap(victim.rx[Log].partial), 2*MaxLogMessage)
}

func TestAPeerThatPassesOverTheEndOfTLSIsTruncated(t *testing.T) {
	a, b := pairKeys(t, "db")
	l, e := listen(t, Config{Keys: a, Suspect: 5 * time.Second, Dead: 10 * time.Second})
	conns, victim := intrude(t, l, b)
	victim.Start(func(Class, []byte) {})
	// A record that no key of the session made.
	_, err := conns[Log].NetConn().Write(append([]byte{23, 3, 3, 0, 32}, make([]byte, 32)...))
	require.NoError(t, err)
	require.Equal(t, Unencrypted, e.kind(t, EventDown).Reason)
}

func TestSessionsOfOnePeerAreBounded(t *testing.T) {
	a, b := pairKeys(t, "db")
	l, e := listen(t, Config{Keys: a})
	h := goodHello(b)
	for i := range maxSessions + 1 {
		h.session = nonce{byte(i + 1)}
		newHostile(t, l, b).say(kindHello, h.append(nil)).hear()
	}
	require.Equal(t, Busy, e.kind(t, EventRefused).Reason)
}

func TestNobodyIsThere(t *testing.T) {
	_, b := pairKeys(t, "db")
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	address := ln.Addr().String()
	ln.Close()
	_, err = Dial(t.Context(), Config{Keys: b}, address)
	require.Equal(t, Unreachable, ReasonOf(err))
}

func TestKeysAreMadeOnceAndProtected(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "deep", "db")
	f, err := CreatePair(dir, "db", false)
	require.NoError(t, err)
	files := 0
	require.NoError(t, filepath.Walk(dir, func(path string, i os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		want := os.FileMode(0o600)
		if i.IsDir() {
			want = 0o700
		} else {
			files++
		}
		require.Equal(t, want, i.Mode().Perm(), path)
		return nil
	}))
	require.Equal(t, 6, files, "the authority's private key is nowhere")
	a, b := loadSide(t, dir, A), loadSide(t, dir, B)
	require.Equal(t, f, a.Fingerprint)
	require.Equal(t, f, b.Fingerprint)
	require.Equal(t, "db", a.Pair)
	require.Equal(t, []Side{A, B}, []Side{a.Side, b.Side})

	_, err = CreatePair(dir, "db", false)
	require.Equal(t, KeysExist, ReasonOf(err))
	require.Equal(t, f, loadSide(t, dir, A).Fingerprint)
	g, err := CreatePair(dir, "db", true)
	require.NoError(t, err)
	require.NotEqual(t, f, g)
	require.Equal(t, g, loadSide(t, dir, B).Fingerprint)

	// Force replaces keys and nothing else.
	other := filepath.Join(dir, "a", "thesis.tex")
	require.NoError(t, os.WriteFile(other, nil, 0o600))
	_, err = CreatePair(dir, "db", true)
	require.Equal(t, NotKeys, ReasonOf(err))
	require.FileExists(t, other)
	left, err := os.ReadDir(filepath.Dir(dir))
	require.NoError(t, err)
	require.Len(t, left, 1, "no temporary directory stays")

	for _, name := range []string{"", "-x", "x/y", "Db", "1", strings.Repeat("a", 64)} {
		_, err = CreatePair(filepath.Join(t.TempDir(), "k"), name, false)
		require.Equal(t, BadName, ReasonOf(err), name)
	}
}

func TestKeysThatAreNotRightAreNotLoaded(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "db")
	_, err := CreatePair(dir, "db", false)
	require.NoError(t, err)
	side := filepath.Join(dir, "a")
	_, err = LoadKeys(dir)
	require.Equal(t, KeysMissing, ReasonOf(err))
	require.NoError(t, os.Chmod(filepath.Join(side, keyFile), 0o640))
	_, err = LoadKeys(side)
	require.Equal(t, KeysReadable, ReasonOf(err))
	require.NoError(t, os.Chmod(filepath.Join(side, keyFile), 0o600))
	// The other side's key, another pair's authority, no PEM.
	move := func(from, to string) {
		b, err := os.ReadFile(from)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(to, b, 0o600))
	}
	move(filepath.Join(dir, "b", keyFile), filepath.Join(side, keyFile))
	_, err = LoadKeys(side)
	require.Equal(t, KeysUnreadable, ReasonOf(err))
	other := filepath.Join(t.TempDir(), "db")
	_, err = CreatePair(other, "db", false)
	require.NoError(t, err)
	move(filepath.Join(other, "a", authorityFile), filepath.Join(dir, "b", authorityFile))
	_, err = LoadKeys(filepath.Join(dir, "b"))
	require.Equal(t, KeysUnreadable, ReasonOf(err))
	require.NoError(t, os.WriteFile(filepath.Join(other, "b", certificateFile), []byte("hello"), 0o600))
	_, err = LoadKeys(filepath.Join(other, "b"))
	require.Equal(t, KeysUnreadable, ReasonOf(err))
}
