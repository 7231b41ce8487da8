package event

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestCatalogIsConsistent(t *testing.T) {
	ids, kinds := map[string]bool{}, map[Kind]bool{}
	last := ""
	for _, m := range Catalog() {
		require.Regexp(t, `^FTV-\d{4}$`, m.ID)
		require.Greater(t, m.ID, last, "the catalogue is in order of ID")
		last = m.ID
		require.False(t, ids[m.ID] || kinds[m.Kind], "%s %s appears twice", m.ID, m.Kind)
		ids[m.ID], kinds[m.Kind] = true, true
		require.Contains(t, []Severity{Good, Warning, Error, Information, Unknown}, m.Severity)
		require.True(t, strings.HasSuffix(m.Text, "."), "%s: the text is a sentence", m.ID)
		if m.Severity == Error || m.Severity == Warning {
			require.NotEmpty(t, m.Remedy, "%s asks for action and must say which", m.ID)
		}
		got, ok := Lookup(m.Kind)
		require.True(t, ok)
		require.Equal(t, m, got)
	}
	_, ok := Lookup("no-such-kind")
	require.False(t, ok)
}

func TestEmitWritesOneLineAnEvent(t *testing.T) {
	var out bytes.Buffer
	e := New(&out, "ledger")
	e.now = func() time.Time {
		return time.Date(2026, 2, 3, 5, 5, 6, 7, time.FixedZone("east", 3600))
	}
	e.Emit(Started, nil)
	e.Emit(Saved, Attrs{"path": "/tmp/a\nb", "pause_ms": 12})
	require.Equal(t, `{"time":"2026-02-03T04:05:06.000000007Z","event":"started","id":"FTV-0001","severity":"good","guest":"ledger","seq":1}
{"time":"2026-02-03T04:05:06.000000007Z","event":"saved","id":"FTV-0009","severity":"information","guest":"ledger","seq":2,"attrs":{"path":"/tmp/a\nb","pause_ms":12}}
`, out.String())
}

func TestEmitTruncatesAttributesThatAreTooLong(t *testing.T) {
	var out bytes.Buffer
	e := New(&out, "")
	e.Emit(DiskError, Attrs{"text": strings.Repeat("x", MaxLine)})
	e.Emit(DiskError, Attrs{"unencodable": func() {}})
	for _, line := range bytes.SplitAfter(bytes.TrimSpace(out.Bytes()), []byte("\n")) {
		require.LessOrEqual(t, len(line), MaxLine)
		ev, err := Decode(line)
		require.NoError(t, err)
		require.Equal(t, Attrs{"truncated": true}, ev.Attrs)
	}
}

// breakable fails while broken.
type breakable struct {
	bytes.Buffer
	broken bool
}

func (b *breakable) Write(p []byte) (int, error) {
	if b.broken {
		return 0, errors.New("no space left")
	}
	return b.Buffer.Write(p)
}

func TestLostEventsAreReportedWhenWritingWorksAgain(t *testing.T) {
	var w breakable
	e := New(&w, "")
	w.broken = true
	e.Emit(Started, nil)
	e.Emit(Paused, nil)
	e.Emit(Resumed, nil)
	require.EqualValues(t, 3, e.Lost())
	w.broken = false
	e.Emit(PoweredOff, nil)
	require.Zero(t, e.Lost())
	lines := bytes.Split(bytes.TrimSpace(w.Bytes()), []byte("\n"))
	require.Len(t, lines, 2)
	first, err := Decode(lines[0])
	require.NoError(t, err)
	require.Equal(t, EventsLost, first.Kind)
	require.Equal(t, Attrs{"count": 3.0}, first.Attrs)
	second, err := Decode(lines[1])
	require.NoError(t, err)
	require.Equal(t, PoweredOff, second.Kind)
}

func TestOpenAppendsToAPrivateFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events")
	for range 2 {
		e, err := Open(path, "g")
		require.NoError(t, err)
		e.Emit(Started, nil)
		require.NoError(t, e.Close())
		e.Emit(Paused, nil)
		require.NoError(t, e.Close(), "closing twice is harmless")
	}
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, 2, bytes.Count(b, []byte("\n")))
	require.NotContains(t, string(b), "paused")
	fi, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), fi.Mode().Perm())
}

func TestOpenADescriptor(t *testing.T) {
	r, w, err := os.Pipe()
	require.NoError(t, err)
	defer r.Close()
	e, err := Open("fd:"+itoa(int(w.Fd())), "g")
	require.NoError(t, err)
	require.NoError(t, w.Close(), "the emitter holds a descriptor of its own")
	e.Emit(Started, nil)
	require.NoError(t, e.Close())
	b := make([]byte, MaxLine)
	n, err := r.Read(b)
	require.NoError(t, err)
	require.Contains(t, string(b[:n]), "FTV-0001")

	for _, bad := range []string{"fd:0", "fd:-1", "fd:99999", "fd:1x", "fd:01", filepath.Join(t.TempDir(), "no", "dir")} {
		_, err := Open(bad, "g")
		if bad == "fd:1x" || bad == "fd:01" {
			require.Error(t, err, "%s", bad)
			continue
		}
		require.ErrorContains(t, err, "event:", "%s", bad)
	}
}

func itoa(n int) string { b, _ := json.Marshal(n); return string(b) }

func TestAFullPipeLosesEventsAndDoesNotBlock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fifo")
	require.NoError(t, unix.Mkfifo(path, 0o600))
	e, err := Open(path, "g")
	require.NoError(t, err)
	defer e.Close()
	// A pipe holds 64 KiB; this returns because no write waits for a reader.
	for i := 0; e.Lost() == 0; i++ {
		require.Less(t, i, 100, "the pipe never filled")
		e.Emit(Started, Attrs{"padding": strings.Repeat("x", MaxLine-1000)})
	}
}

func TestANilEmitterIsSilent(t *testing.T) {
	var e *Emitter
	e.Emit(Started, nil)
	require.Zero(t, e.Lost())
	require.NoError(t, e.Close())
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"time":"2026-02-03T04:05:06Z","event":"started","id":"FTV-0001","severity":"good","seq":1}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		ev, err := Decode(line)
		if err != nil {
			return
		}
		require.NotEmpty(t, ev.Kind)
		again, err := json.Marshal(ev)
		require.NoError(t, err)
		if len(again) <= MaxLine {
			_, err = Decode(again)
			require.NoError(t, err)
		}
	})
}
