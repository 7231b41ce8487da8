package witness_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
	"go.uber.org/zap"

	"github.com/ftvmm/ftvmm/lockstep/arbiter"
	"github.com/ftvmm/ftvmm/lockstep/arbiter/etcd"
	"github.com/ftvmm/ftvmm/lockstep/arbiter/witness"
	"github.com/ftvmm/ftvmm/lockstep/link"
	"github.com/ftvmm/ftvmm/lockstep/protocol"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 30 * time.Second

// logbook is what a witness has logged.
type logbook struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logbook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logbook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// site is a witness with keys, and pairs that may use it.
type site struct {
	*testing.T
	dir  string
	w    *witness.Witness
	logs logbook
}

func newSite(t *testing.T, pairs ...string) *site {
	s := &site{T: t, dir: t.TempDir()}
	require.NoError(t, witness.Init(s.path("keys"), []string{"localhost", "127.0.0.1"}))
	for _, p := range pairs {
		require.NoError(t, witness.Grant(s.path("keys"), p, s.path(p), false))
	}
	s.start()
	t.Cleanup(func() { require.NoError(t, s.w.Close()) })
	return s
}

func (s *site) path(name string) string { return filepath.Join(s.dir, name) }

func (s *site) start() {
	s.Helper()
	var err error
	s.w, err = witness.Start(s.Context(), witness.Config{
		Data: s.path("data"), Listen: "127.0.0.1:0", Keys: s.path("keys"), Log: slog.New(slog.NewTextHandler(&s.logs, nil)),
	})
	require.NoError(s, err)
}

// open opens the arbiter of a pair with the keys in a directory.
func (s *site) open(pair, keys string) *etcd.Arbiter {
	s.Helper()
	_, port, err := net.SplitHostPort(s.w.Addr().String())
	require.NoError(s, err)
	a, err := etcd.Open(etcd.Config{Pair: pair, Endpoints: []string{"localhost:" + port}, Keys: s.path(keys), Timeout: patience})
	require.NoError(s, err)
	s.Cleanup(func() { a.Close() })
	return a
}

// client is etcd's own, which can do more than an arbiter does.
func (s *site) client(keys, pair string) *clientv3.Client {
	s.Helper()
	var config *tls.Config
	if keys != "" {
		var err error
		config, err = etcd.LoadTLS(s.path(keys), pair)
		require.NoError(s, err)
	}
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{"https://" + s.w.Addr().String()}, TLS: config, Logger: zap.NewNop()})
	require.NoError(s, err)
	s.Cleanup(func() { c.Close() })
	return c
}

func solo(epoch uint64, s protocol.Side, nonce uint64) protocol.Record {
	return protocol.Record{Epoch: epoch, InSync: protocol.Only(s), Primary: s, Nonce: nonce}
}

func requireReason(t require.TestingT, reason string, err error) {
	var e *arbiter.Error
	require.ErrorAs(t, err, &e)
	require.Equal(t, reason, e.Reason, "%v", err)
	require.NotEmpty(t, e.Remedy)
}

func TestBothSidesOfAPairShareARecord(t *testing.T) {
	t.Parallel()
	s := newSite(t, "db")
	a, b := s.open("db", "db/a"), s.open("db", "db/b")
	want := solo(1, protocol.A, 5)
	ok, _, err := a.Swap(t.Context(), want)
	require.NoError(t, err)
	require.True(t, ok)
	held, err := b.Read(t.Context())
	require.NoError(t, err)
	require.Equal(t, want, held)

	// And it outlives the witness.
	require.NoError(t, s.w.Close())
	s.start()
	held, err = s.open("db", "db/b").Read(t.Context())
	require.NoError(t, err)
	require.Equal(t, want, held)
	require.NotContains(t, s.logs.String(), "level=ERROR")
	require.NotContains(t, s.logs.String(), "level=WARN")
}

func TestAPairReachesItsOwnRecordOnly(t *testing.T) {
	t.Parallel()
	s := newSite(t, "db", "db1", "root")
	_, _, err := s.open("db1", "db1/a").Swap(t.Context(), solo(1, protocol.A, 5))
	require.NoError(t, err)
	ctx := t.Context()
	for _, pair := range []string{"db", "root"} {
		c := s.client(pair+"/a", pair)
		for name, op := range map[string]clientv3.Op{
			"read":           clientv3.OpGet(etcd.Key("db1")),
			"write":          clientv3.OpPut(etcd.Key("db1"), "x"),
			"delete":         clientv3.OpDelete(etcd.Key("db1")),
			"read all":       clientv3.OpGet("", clientv3.WithPrefix()),
			"delete all":     clientv3.OpDelete("", clientv3.WithPrefix()),
			"write near own": clientv3.OpPut(etcd.Key(pair)+"/x", "x"),
			"a nested write": clientv3.OpTxn(nil, []clientv3.Op{clientv3.OpPut(etcd.Key("db1"), "x")}, nil),
		} {
			_, err := c.Txn(ctx).Then(op).Commit()
			require.ErrorContains(t, err, "permission denied", "%s: %s", pair, name)
		}
		_, err := c.Txn(ctx).If(clientv3.Compare(clientv3.Value(etcd.Key("db1")), ">", "")).Commit()
		require.ErrorContains(t, err, "permission denied", "%s: compare", pair)
		_, err = c.Get(ctx, etcd.Key("db1"), clientv3.WithSerializable())
		require.ErrorContains(t, err, "permission denied", "%s: read from memory", pair)
	}
	// The arbiter says so in its own words.
	_, err = etcd.Open(etcd.Config{Pair: "db1", Endpoints: []string{"localhost:1"}, Keys: s.path("db/a")})
	requireReason(t, arbiter.BadKeys, err)
	require.ErrorContains(t, err, `those of the pair "db", not of "db1"`)
}

func TestNothingButRecordsIsServed(t *testing.T) {
	t.Parallel()
	s := newSite(t, "db")
	c := s.client("db/a", "db")
	ctx := t.Context()
	for name, call := range map[string]func() error{
		"put":     func() error { _, err := c.Put(ctx, etcd.Key("db"), "x"); return err },
		"delete":  func() error { _, err := c.Delete(ctx, etcd.Key("db")); return err },
		"compact": func() error { _, err := c.Compact(ctx, 1); return err },
		"lease":   func() error { _, err := c.Grant(ctx, 60); return err },
		"users":   func() error { _, err := c.UserAdd(ctx, "eve", "x"); return err },
		"login":   func() error { _, err := c.Authenticate(ctx, "root", ""); return err },
		"members": func() error { _, err := c.MemberList(ctx); return err },
		"status":  func() error { _, err := c.Status(ctx, "https://"+s.w.Addr().String()); return err },
		"defrag":  func() error { _, err := c.Defragment(ctx, "https://"+s.w.Addr().String()); return err },
	} {
		err := call()
		require.Error(t, err, name)
		require.Regexp(t, "does not offer|unknown service|Unimplemented", err.Error(), name)
	}
	big := clientv3.OpPut(etcd.Key("db"), strings.Repeat("x", 32<<10))
	_, err := c.Txn(ctx).Then(big).Commit()
	require.ErrorContains(t, err, "larger than max")
}

func TestStrangersAreRefused(t *testing.T) {
	t.Parallel()
	s := newSite(t, "db")
	require.NoError(t, witness.Init(s.path("elsewhere"), []string{"localhost"}))
	require.NoError(t, witness.Grant(s.path("elsewhere"), "db", s.path("forged"), false))

	// Of another authority on both ends: it is this side that notices first.
	_, err := s.open("db", "forged/a").Read(t.Context())
	requireReason(t, arbiter.NoAnswer, err)
	require.ErrorContains(t, err, "certificate")

	// With the right authority to check with, and the wrong one to be checked by.
	authority, err := os.ReadFile(s.path("db/a/" + etcd.AuthorityFile))
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(s.path("forged/a/"+etcd.AuthorityFile), authority, 0o600))
	require.Eventually(t, func() bool { // the refusal comes after the handshake, with the first call or before
		_, err := s.open("db", "forged/a").Read(t.Context())
		requireReason(t, arbiter.NoAnswer, err)
		return strings.Contains(s.logs.String(), `msg="connection refused"`)
	}, patience, 10*time.Millisecond)

	// Without a certificate, and without encryption.
	config, err := etcd.LoadTLS(s.path("db/a"), "db")
	require.NoError(t, err)
	config.Certificates = nil
	conn, err := tls.Dial("tcp", s.w.Addr().String(), config)
	if err == nil {
		_, err = conn.Read(make([]byte, 1))
		conn.Close()
	}
	require.ErrorContains(t, err, "certificate required")
	conn, err = tls.Dial("tcp", s.w.Addr().String(), &tls.Config{MaxVersion: tls.VersionTLS12, InsecureSkipVerify: true})
	require.ErrorContains(t, err, "protocol version")
	require.Nil(t, conn)
	plain, err := etcd.Open(etcd.Config{Pair: "db", Endpoints: []string{s.w.Addr().String()}, Timeout: patience})
	require.NoError(t, err)
	defer plain.Close()
	_, err = plain.Read(t.Context())
	requireReason(t, arbiter.NoAnswer, err)
}

func TestAWitnessUnderAnotherNameIsRefused(t *testing.T) {
	t.Parallel()
	s := newSite(t, "db")
	require.NoError(t, os.Rename(s.path("keys"), s.path("old")))
	require.NoError(t, witness.Init(s.path("keys"), []string{"elsewhere.example"}))
	require.NoError(t, witness.Grant(s.path("keys"), "db", s.path("new"), false))
	require.NoError(t, s.w.Close())
	s.start()
	_, err := s.open("db", "new/a").Read(t.Context())
	requireReason(t, arbiter.NoAnswer, err)
	require.ErrorContains(t, err, "not localhost")
}

func TestGrantsAreFollowedWhileItRuns(t *testing.T) {
	t.Parallel()
	s := newSite(t, "db")
	ctx := t.Context()
	old := s.open("db", "db/a")
	_, err := old.Read(ctx)
	require.NoError(t, err)

	// A new pair.
	require.NoError(t, witness.Grant(s.path("keys"), "web", s.path("web"), false))
	web := s.open("web", "web/b")
	require.Eventually(t, func() bool {
		_, err = web.Read(ctx)
		return err == nil
	}, patience, 10*time.Millisecond)

	// New credentials of an old one: the old ones end, also on a connection that stands.
	requireReason(t, witness.KeysExist, witness.Grant(s.path("keys"), "db", s.path("db"), false))
	requireReason(t, witness.KeysExist, witness.Grant(s.path("keys"), "db", s.path("db-again"), false))
	require.NoError(t, witness.Grant(s.path("keys"), "db", s.path("db-new"), true))
	require.Eventually(t, func() bool {
		_, err = old.Read(ctx)
		return err != nil
	}, patience, 10*time.Millisecond)
	requireReason(t, arbiter.NotGranted, err)
	_, err = s.open("db", "db-new/a").Read(ctx)
	require.NoError(t, err)

	// A pair that is taken off the list, and one that cannot be read.
	require.NoError(t, os.WriteFile(s.path("keys/pairs/bad"), []byte("root\n"), 0o600))
	require.Eventually(t, func() bool { return strings.Contains(s.logs.String(), "names no user") }, patience, 10*time.Millisecond)
	_, err = web.Read(ctx)
	require.NoError(t, err, "access stays as it was")
	require.NoError(t, os.Remove(s.path("keys/pairs/bad")))
	require.NoError(t, os.Remove(s.path("keys/pairs/web")))
	require.Eventually(t, func() bool {
		_, err = web.Read(ctx)
		return err != nil
	}, patience, 10*time.Millisecond)
	requireReason(t, arbiter.NotGranted, err)
}

func TestTheQuotaHealsWithARestart(t *testing.T) {
	t.Parallel()
	s := newSite(t, "db", "web")
	ctx := t.Context()
	c := s.client("db/a", "db")
	junk := strings.Repeat("x", 12<<10)
	var writers sync.WaitGroup
	for range 12 { // 5,000 writes in all
		writers.Go(func() {
			var err error
			for err == nil {
				_, err = c.Txn(ctx).Then(clientv3.OpPut(etcd.Key("db"), junk)).Commit()
			}
			if !strings.Contains(err.Error(), "space exceeded") {
				t.Error(err)
			}
		})
	}
	writers.Wait()
	_, _, err := s.open("web", "web/a").Swap(ctx, solo(1, protocol.A, 5))
	require.ErrorContains(t, err, "space exceeded")
	require.NoError(t, s.w.Close())
	s.start()
	ok, _, err := s.open("web", "web/a").Swap(ctx, solo(1, protocol.A, 5))
	require.NoError(t, err)
	require.True(t, ok)
}

func TestOneWitnessForOneDirectory(t *testing.T) {
	t.Parallel()
	data := t.TempDir()
	w, err := witness.Start(t.Context(), witness.Config{Data: data, Listen: "127.0.0.1:0", Insecure: true})
	require.NoError(t, err)
	_, err = witness.Start(t.Context(), witness.Config{Data: data, Listen: "127.0.0.1:0", Insecure: true})
	requireReason(t, witness.DataInUse, err)
	_, err = witness.Start(t.Context(), witness.Config{Data: t.TempDir(), Listen: w.Addr().String(), Insecure: true})
	requireReason(t, witness.BadListen, err)
	require.NoError(t, w.Close())
	require.NoError(t, w.Close(), "twice does no harm")
}

func TestWhatDoesNotStart(t *testing.T) {
	t.Parallel()
	s := newSite(t, "db")
	require.NoError(t, s.w.Close())
	require.NoError(t, os.Mkdir(s.path("empty"), 0o700))
	require.NoError(t, witness.Init(s.path("loose"), []string{"localhost"}))
	require.NoError(t, os.Chmod(s.path("loose/key.pem"), 0o640))
	for _, c := range []struct {
		name   string
		cfg    witness.Config
		reason string
	}{
		{"insecure for the world", witness.Config{Data: s.path("x"), Listen: ":0", Insecure: true}, witness.NotLoopback},
		{"insecure on an address", witness.Config{Data: s.path("x"), Listen: "192.0.2.1:0", Insecure: true}, witness.NotLoopback},
		{"insecure with protected records", witness.Config{Data: s.path("data"), Listen: "127.0.0.1:0", Insecure: true}, witness.NeedsKeys},
		{"no keys", witness.Config{Data: s.path("x"), Listen: ":0", Keys: s.path("empty")}, arbiter.BadKeys},
		{"keys that others read", witness.Config{Data: s.path("x"), Listen: ":0", Keys: s.path("loose")}, arbiter.KeysReadable},
		{"no address", witness.Config{Data: s.path("x"), Listen: "here", Keys: s.path("keys")}, witness.BadListen},
	} {
		_, err := witness.Start(t.Context(), c.cfg)
		requireReason(t, c.reason, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := witness.Start(ctx, witness.Config{Data: s.path("y"), Listen: "127.0.0.1:0", Keys: s.path("keys")})
	require.ErrorIs(t, err, context.Canceled)
	s.start()
}

func TestKeysThatAreNotMade(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	keys := filepath.Join(dir, "keys")
	for _, hosts := range [][]string{nil, {""}, {"a:2379"}, {"-a"}, {"a..b"}, {strings.Repeat("a", 64)}, {"fe80::1%eth0"}} {
		requireReason(t, witness.BadHost, witness.Init(keys, hosts))
	}
	require.NoDirExists(t, keys)
	require.NoError(t, witness.Init(keys, []string{"witness.example", "192.0.2.7", "2001:db8::7"}))
	requireReason(t, witness.KeysExist, witness.Init(keys, []string{"witness.example"}))

	for _, pair := range []string{"", "../x", "Db", "7"} {
		requireReason(t, witness.BadName, witness.Grant(keys, pair, filepath.Join(dir, "out"), false))
	}
	requireReason(t, arbiter.BadKeys, witness.Grant(dir, "db", filepath.Join(dir, "out"), false))
	require.NoDirExists(t, filepath.Join(dir, "out"))

	// A host has one directory for a pair.
	pair := filepath.Join(dir, "pair")
	_, err := link.CreatePair(pair, "db", false)
	require.NoError(t, err)
	require.NoError(t, witness.Grant(keys, "db", pair, false))
	for _, side := range []string{"a", "b"} {
		_, err = link.LoadKeys(filepath.Join(pair, side))
		require.NoError(t, err)
		_, err = etcd.LoadTLS(filepath.Join(pair, side), "db")
		require.NoError(t, err)
		st, err := os.Stat(filepath.Join(pair, side, etcd.KeyFile))
		require.NoError(t, err)
		require.Zero(t, st.Mode().Perm()&0o077)
	}
	left, err := filepath.Glob(filepath.Join(pair, "*", ".*"))
	require.NoError(t, errors.Join(err))
	require.Empty(t, left)
}
