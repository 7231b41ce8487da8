package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/ftvmm/ftvmm/lockstep/arbiter/open"
	"github.com/ftvmm/ftvmm/lockstep/protocol"
)

// witnessProcess is "ftvmm witness run" in a process of its own.
type witnessProcess struct {
	*exec.Cmd
	ready  witnessDocument
	stderr bytes.Buffer
}

func startWitness(t *testing.T, args ...string) *witnessProcess {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	// Under the name "ftvmm" the test binary is the command, see TestMain.
	w := &witnessProcess{Cmd: exec.Command(self)}
	w.Args = append([]string{"ftvmm", "witness", "run", "--json", "--listen=127.0.0.1:0"}, args...)
	w.Stderr = &w.stderr
	out, err := w.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, w.Start())
	late := time.AfterFunc(time.Minute, func() { w.Process.Kill() })
	t.Cleanup(func() {
		late.Stop()
		if w.ProcessState == nil {
			w.Process.Kill()
			w.Wait()
		}
	})
	require.NoError(t, json.NewDecoder(out).Decode(&w.ready), "%v", &w.stderr)
	return w
}

// end sends a signal, after which the witness ends as it should.
func (w *witnessProcess) end(t *testing.T, s unix.Signal) {
	t.Helper()
	require.NoError(t, w.Process.Signal(s))
	require.NoError(t, w.Wait(), "%v", &w.stderr)
	require.NotRegexp(t, "level=(WARN|ERROR)", w.stderr.String())
}

func TestWitness(t *testing.T) {
	dir := t.TempDir()
	keys, pair, data := filepath.Join(dir, "keys"), filepath.Join(dir, "db"), filepath.Join(dir, "data")
	var out, stderr bytes.Buffer
	require.Zero(t, execute([]string{"witness", "init", keys, "--host=127.0.0.1"}, &out, &stderr), "%v", &stderr)
	require.Zero(t, execute([]string{"witness", "grant", keys, "db", "--out", pair}, &out, &stderr), "%v", &stderr)

	w := startWitness(t, "--data", data, "--keys", keys)
	require.Equal(t, "WitnessReady", w.ready.Kind)
	require.Equal(t, data, w.ready.Data)
	bid := protocol.Record{Epoch: 1, InSync: protocol.Both, Primary: protocol.B, Nonce: 9}
	a, closer, err := open.Arbiter("etcd:"+w.ready.Listen+"?keys="+filepath.Join(pair, "a"), "db")
	require.NoError(t, err)
	ok, _, err := a.Swap(t.Context(), bid)
	require.NoError(t, err)
	require.True(t, ok)
	require.NoError(t, closer.Close())

	// Not two of them on one directory.
	stderr.Reset()
	require.Equal(t, exitConflict, execute([]string{"witness", "run", "--listen=127.0.0.1:0", "--data", data, "--keys", keys}, &out, &stderr))
	require.Contains(t, stderr.String(), "(data-in-use)")
	w.end(t, unix.SIGTERM)

	// A witness that was killed has lost nothing.
	w = startWitness(t, "--data", data, "--keys", keys)
	require.NoError(t, w.Process.Kill())
	require.Error(t, w.Wait())
	w = startWitness(t, "--data", data, "--keys", keys)
	b, closer, err := open.Arbiter("etcd:"+w.ready.Listen+"?keys="+filepath.Join(pair, "b"), "db")
	require.NoError(t, err)
	held, err := b.Read(t.Context())
	require.NoError(t, err)
	require.Equal(t, bid, held)
	require.NoError(t, closer.Close())
	w.end(t, unix.SIGINT)
}
