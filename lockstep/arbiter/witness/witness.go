// Package witness is the third machine of a pair: an etcd of one member, in this process, that keeps
// the records of any number of pairs.
//
// It runs no guest and needs next to nothing: some megabytes of disk and of memory, and a network to both hosts that does
// not fail together with the link between them. It may be away for a while: pairs run on, and only a side that
// must decide waits for it.
//
// What is etcd's own is the storage: the write-ahead log, the transaction, the order of reads, users and roles.
// The rest of its doors are shut. It has no port for other members, no HTTP, and of the services of its API there
// are two calls, Range and Txn, over TLS 1.3 with a certificate on both ends, which a role restricts to one key for
// each pair. Nobody can log in as its administrator: what has to be administered is done in this process, from the
// list of grants that [Grant] writes.
//
// A cluster of several witnesses is not made here: package etcd speaks to any etcd cluster.
package witness

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3rpc"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/ftvmm/ftvmm/lockstep/arbiter/etcd"
)

// Limits. A record is a hundred bytes and changes when something breaks or is mended.
const (
	maxConnections = 1024     // of all pairs: two for each, and what lingers
	maxCalls       = 16       // at once on a connection
	maxRequest     = 16 << 10 // bytes of a request
	maxTxnOps      = 4        // operations in a transaction
	maxBackend     = 64 << 20 // bytes of etcd's database (its quota)
	keptRevisions  = "1000"   // of old records, which nobody reads
	snapshotCount  = 1000     // changes between two snapshots of the write-ahead log
	segment        = 4 << 20  // bytes of a file of that log, two of which are made in advance
)

const (
	// tick and election of a cluster of one: nobody else is asked, so the election only delays the start.
	tick, election = 50 * time.Millisecond, 500 * time.Millisecond
	// handshakeTime bounds a TLS handshake; goodbye is how long calls under way may take at the end.
	handshakeTime, goodbye = 5 * time.Second, time.Second
	// pingTime is how often a client may probe a connection, and idleTime after what silence it is probed from
	// here.
	pingTime, idleTime = 5 * time.Second, time.Minute
	// grantsEvery is how often the list of grants is looked at.
	grantsEvery = 500 * time.Millisecond
)

// etcd's own size is for clusters that are busy; it has no other setting for it.
func init() { wal.SegmentSizeBytes = segment }

// Config says how a witness runs.
type Config struct {
	// Data is the directory of the records; it is made if it is not there. Whoever loses it stops every
	// pair that needs a decision: a pair does not accept a witness that knows less than it.
	Data string
	// Listen is the address for the hosts, "host:port" with an IP address or no host.
	Listen string
	// Keys is the directory that [Init] made.
	Keys string
	// Insecure runs without keys, and so without encryption and access control, on a loopback address. For
	// tests.
	Insecure bool
	// Log takes what should be seen; nil means nobody does.
	Log *slog.Logger
}

// Witness is one that runs.
type Witness struct {
	log      *slog.Logger
	keys     string
	lock     *os.File
	listener net.Listener
	etcd     *embed.Etcd
	server   *grpc.Server
	stop     context.CancelFunc
	running  sync.WaitGroup
	done     chan struct{}
	failed   chan error // the first error that ended it
	closing  sync.Once
}

// Start starts a witness, and returns when it answers.
func Start(ctx context.Context, cfg Config) (_ *Witness, err error) {
	w := &Witness{log: cfg.Log, keys: cfg.Keys, done: make(chan struct{}), failed: make(chan error, 1)}
	if w.log == nil {
		w.log = slog.New(slog.DiscardHandler)
	}
	creds := insecure.NewCredentials()
	if cfg.Insecure {
		if host, _, err := net.SplitHostPort(cfg.Listen); err != nil || !etcd.Loopback(host) {
			return nil, refuse(NotLoopback, "listen on 127.0.0.1, or make keys with ftvmm witness init", "without keys a witness listens on this host only, not on %q", cfg.Listen)
		}
		w.keys = ""
	} else if creds, err = w.credentials(); err != nil {
		return nil, err
	}
	if w.lock, err = lockData(cfg.Data); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			w.release()
		}
	}()
	if w.listener, err = net.Listen("tcp", cfg.Listen); err != nil {
		return nil, refuse(BadListen, "give --listen an address of this host and a free port, as in :2379", "listening for hosts: %w", err)
	}
	if err := w.startEtcd(ctx, cfg.Data); err != nil {
		return nil, err
	}
	if err := w.makeRoom(ctx); err != nil {
		return nil, fmt.Errorf("making room: %w", err)
	}
	if enabled := w.etcd.Server.AuthStore().IsAuthEnabled(); cfg.Insecure && enabled {
		return nil, refuse(NeedsKeys, "run it with --keys", "the records in %s are those of a witness with keys", cfg.Data)
	}
	var stop context.Context
	stop, w.stop = context.WithCancel(context.Background())
	if !cfg.Insecure {
		g := grants{server: w.etcd.Server, dir: filepath.Join(w.keys, grantsDir), log: w.log}
		if err := g.enable(ctx); err != nil {
			return nil, fmt.Errorf("setting up access: %w", err)
		}
		if err := g.sync(ctx); err != nil {
			return nil, fmt.Errorf("setting up access: %w", err)
		}
		w.running.Go(func() { g.follow(stop) })
	}
	w.server = grpc.NewServer(
		grpc.Creds(creds),
		grpc.ConnectionTimeout(handshakeTime),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxConcurrentStreams(maxCalls),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: pingTime, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: idleTime}),
		grpc.UnaryInterceptor(onlyRecords),
		grpc.StreamInterceptor(noStreams),
	)
	etcdserverpb.RegisterKVServer(w.server, v3rpc.NewQuotaKVServer(w.etcd.Server))
	w.running.Go(func() { w.fail(w.server.Serve(transport.LimitListener(w.listener, maxConnections))) })
	w.running.Go(func() {
		select {
		case <-stop.Done():
		case err := <-w.etcd.Err():
			w.fail(fmt.Errorf("etcd ended: %w", err))
		case <-w.etcd.Server.StopNotify():
			w.fail(errors.New("etcd ended"))
		}
	})
	return w, nil
}

// startEtcd starts etcd without any door, and waits until it can decide.
func (w *Witness) startEtcd(ctx context.Context, data string) (err error) {
	const name = "witness"
	cfg := embed.NewConfig()
	cfg.Name = name
	cfg.Dir = filepath.Join(data, "etcd")
	cfg.ListenPeerUrls, cfg.ListenClientUrls = nil, nil
	// Nobody connects to this; a member must have an address.
	cfg.AdvertisePeerUrls = []url.URL{{Scheme: "http", Host: "localhost:2380"}}
	cfg.InitialCluster = cfg.InitialClusterFromName(name)
	// New data make a new cluster with an identity of its own, which the hosts notice.
	cfg.InitialClusterToken = rand.Text()
	cfg.TickMs, cfg.ElectionMs = uint(tick.Milliseconds()), uint(election.Milliseconds())
	cfg.SnapshotCount = snapshotCount
	cfg.QuotaBackendBytes = maxBackend
	cfg.MaxRequestBytes = maxRequest
	cfg.MaxTxnOps = maxTxnOps
	cfg.AutoCompactionMode, cfg.AutoCompactionRetention = embed.CompactorModeRevision, keptRevisions
	cfg.EnableGRPCGateway = false
	// This is what makes etcd take a certificate's common name for the user's.
	cfg.ClientTLSInfo.ClientCertAuth = w.keys != ""
	core := newCore(w.log)
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.New(core))
	if w.etcd, err = embed.StartEtcd(cfg); err != nil {
		return fmt.Errorf("starting etcd in %s: %w", cfg.Dir, err)
	}
	select {
	case <-w.etcd.Server.ReadyNotify():
		core.ready.Store(true)
		return nil
	case err = <-w.etcd.Err():
	case <-w.etcd.Server.StopNotify():
		err = errors.New("it ended")
	case <-ctx.Done():
		err = ctx.Err()
	}
	return fmt.Errorf("starting etcd in %s: %w", cfg.Dir, err)
}

// makeRoom takes back etcd's alarm that its quota is used up, which stops all writing. A pair that writes its key
// again and again can cause it; old values go, and one for each pair always fits.
func (w *Witness) makeRoom(ctx context.Context) error {
	s := w.etcd.Server
	ctx = s.AuthStore().WithRoot(ctx)
	got, err := s.Alarm(ctx, &etcdserverpb.AlarmRequest{Action: etcdserverpb.AlarmRequest_GET, Alarm: etcdserverpb.AlarmType_NOSPACE})
	if err != nil || len(got.Alarms) == 0 {
		return err
	}
	w.log.Warn("the quota of the records was used up; old values are dropped")
	if _, err := s.Compact(ctx, &etcdserverpb.CompactionRequest{Revision: s.KV().Rev(), Physical: true}); err != nil {
		return err
	}
	if err := s.Backend().Defrag(); err != nil {
		return err
	}
	for _, alarm := range got.Alarms {
		if _, err := s.Alarm(ctx, &etcdserverpb.AlarmRequest{
			Action: etcdserverpb.AlarmRequest_DEACTIVATE, MemberID: alarm.MemberID, Alarm: alarm.Alarm,
		}); err != nil {
			return err
		}
	}
	return nil
}

// onlyRecords lets through the two calls that an arbiter makes.
func onlyRecords(ctx context.Context, req any, call *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	switch call.FullMethod {
	case etcdserverpb.KV_Range_FullMethodName, etcdserverpb.KV_Txn_FullMethodName:
		return next(ctx, req)
	}
	return nil, status.Errorf(codes.PermissionDenied, "a witness does not offer %s", call.FullMethod)
}

func noStreams(_ any, _ grpc.ServerStream, call *grpc.StreamServerInfo, _ grpc.StreamHandler) error {
	return status.Errorf(codes.PermissionDenied, "a witness does not offer %s", call.FullMethod)
}

// Addr returns the address that hosts connect to.
func (w *Witness) Addr() net.Addr { return w.listener.Addr() }

// Done is closed when the witness has ended by itself; Close says why.
func (w *Witness) Done() <-chan struct{} { return w.done }

// fail notes the first error that ended it.
func (w *Witness) fail(err error) {
	select {
	case w.failed <- err:
		close(w.done)
	default:
	}
}

// Close ends the witness. It returns why it had ended before, if it had.
func (w *Witness) Close() (err error) {
	w.closing.Do(func() {
		select {
		case <-w.done:
			err = <-w.failed
		default:
			w.failed <- nil // what fails from now on is of the end's making
		}
		w.release()
	})
	return err
}

// release gives back what there is.
func (w *Witness) release() {
	if w.stop != nil {
		w.stop()
	}
	if w.server != nil {
		late := time.AfterFunc(goodbye, w.server.Stop)
		w.server.GracefulStop()
		late.Stop()
	} else if w.listener != nil {
		w.listener.Close()
	}
	w.running.Wait()
	if w.etcd != nil {
		w.etcd.Close()
	}
	w.lock.Close()
}

// lockData makes the directory of the records if need be, and keeps a second witness out of it.
func lockData(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the directory of the records: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking the records: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, refuse(DataInUse, "end that one, or choose another directory", "a witness runs on %s already", dir)
		}
		return nil, fmt.Errorf("locking the records: %w", err)
	}
	return f, nil
}
