// Package etcd is an arbiter that keeps the record of a pair in etcd: a cluster that is there already,
// or the witness of package witness.
//
// There is one key for each pair. Its value is the record; a swap is one transaction that compares the
// value with the record that was read, or the key with its absence, and then puts. So the test-and-set
// is etcd's, and so are durability and the order of reads: every read is linearizable.
//
// Nothing is repeated here behind the caller's back once it may have taken effect. When an answer is
// lost the error says so and nothing more, and the protocol asks again with the same nonce.
//
// A value that is no record is an error, never "no record". A key that somebody has deleted is no record:
// the protocol refuses that from a pair that had one.
//
// All endpoints must be members of one cluster. Two witnesses that know nothing of each other would let
// each side win one; so an answer from another cluster than the first is refused.
package etcd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ftvmm/ftvmm/lockstep/arbiter"
	"github.com/ftvmm/ftvmm/lockstep/link"
	"github.com/ftvmm/ftvmm/lockstep/protocol"
)

// DefaultTimeout bounds a call whose context allows more, or has no deadline. A swap is two round trips
// and one write to the disk of a majority; what takes longer than this is better asked again.
const DefaultTimeout = 2 * time.Second

const (
	// maxMessage bounds an answer, in bytes: a record and etcd's header fit many times.
	maxMessage = 64 << 10
	// minRetry and maxRetry are the pause between two attempts to connect. A pair that waits for its
	// arbiter stands still, so the longest pause counts and not the traffic.
	minRetry, maxRetry = 100 * time.Millisecond, time.Second
	// probeEvery is how often a connection with a call under way is probed (gRPC allows no less), and
	// silence how long data may stay unacknowledged (TCP_USER_TIMEOUT) before it is given up.
	probeEvery, silence = 10 * time.Second, 2 * time.Second
	// accessAttempts is how often a call is made that meets changes of access.
	accessAttempts = 8
)

// Key returns the key of a pair's record: all that its credentials must reach.
func Key(pair string) string { return "/ftvmm/pair/" + pair + "/record" }

// Config says which record of which cluster is meant.
type Config struct {
	// Pair is the name of the pair, see [link.ValidPairName].
	Pair string
	// Endpoints are members of one cluster, each "host:port". The host is also the name that the
	// member's certificate must carry.
	Endpoints []string
	// Keys is the directory of this side's credentials, see [LoadTLS]. Without, the connection is not
	// encrypted, which is allowed to loopback addresses only.
	Keys string
	// Timeout bounds each call; 0 means [DefaultTimeout].
	Timeout time.Duration
}

// Arbiter keeps the record of one pair.
type Arbiter struct {
	pair, key string
	where     string
	timeout   time.Duration
	client    *clientv3.Client

	mu sync.Mutex
	// cluster is who answered first; split is set for good when one of several endpoints turns out to
	// belong to another.
	cluster uint64
	split   bool
	several bool
}

// Open prepares the arbiter; it connects when it is first asked. Close gives it back.
func Open(cfg Config) (*Arbiter, error) {
	if !link.ValidPairName(cfg.Pair) {
		return nil, arbiter.Errorf(arbiter.BadSpec, "take the guest's name", "%q is no name of a pair: take lower case letters, digits and dashes, a letter first", cfg.Pair)
	}
	if len(cfg.Endpoints) == 0 {
		return nil, arbiter.Errorf(arbiter.BadSpec, "give at least one HOST:PORT", "no endpoint of the arbiter is given")
	}
	for _, e := range cfg.Endpoints {
		if err := CheckEndpoint(e, cfg.Keys == ""); err != nil {
			return nil, err
		}
	}
	etcd := clientv3.Config{
		DialKeepAliveTime:    probeEvery,
		DialKeepAliveTimeout: silence,
		MaxCallSendMsgSize:   maxMessage,
		MaxCallRecvMsgSize:   maxMessage,
		MaxUnaryRetries:      1, // one attempt: its error says what is wrong, a retry's says "timeout"
		Logger:               zap.NewNop(),
		DialOptions: []grpc.DialOption{
			grpc.WithConnectParams(grpc.ConnectParams{
				Backoff:           backoff.Config{BaseDelay: minRetry, Multiplier: 1.6, Jitter: 0.2, MaxDelay: maxRetry},
				MinConnectTimeout: silence,
			}),
			grpc.WithChainUnaryInterceptor(failFast),
		},
	}
	scheme := "http://"
	if cfg.Keys != "" {
		var err error
		if etcd.TLS, err = LoadTLS(cfg.Keys, cfg.Pair); err != nil {
			return nil, err
		}
		scheme = "https://"
	}
	for _, e := range cfg.Endpoints {
		etcd.Endpoints = append(etcd.Endpoints, scheme+e)
	}
	client, err := clientv3.New(etcd)
	if err != nil {
		return nil, fmt.Errorf("opening arbiter: %w", err)
	}
	timeout := cfg.Timeout
	if timeout <= 0 {
		timeout = DefaultTimeout
	}
	return &Arbiter{
		pair: cfg.Pair, key: Key(cfg.Pair), where: strings.Join(cfg.Endpoints, ","),
		timeout: timeout, client: client, several: len(cfg.Endpoints) > 1,
	}, nil
}

// failFast lets a call fail when no endpoint can be reached, with the reason; the client of etcd would let
// it wait until its time is up, and then know only that. A call is repeated only if it is certain that it did
// nothing: etcd refused to look at it because access of some pair changed meanwhile.
func failFast(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, next grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	opts = append(opts, grpc.WaitForReady(false))
	var err error
	for range accessAttempts {
		err = next(ctx, method, req, reply, cc, opts...)
		if !errors.Is(rpctypes.Error(err), rpctypes.ErrAuthOldRevision) {
			break
		}
	}
	return err
}

// Close ends the connections. Calls that are under way fail.
func (a *Arbiter) Close() error {
	if err := a.client.Close(); err != nil && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("closing arbiter: %w", err)
	}
	return nil
}

// Read returns the record.
func (a *Arbiter) Read(ctx context.Context) (protocol.Record, error) {
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	r, _, err := a.read(ctx)
	return r, err
}

// read returns the record and the value that it was read from, nil if the key is not there.
func (a *Arbiter) read(ctx context.Context) (protocol.Record, []byte, error) {
	answer, err := a.client.Get(ctx, a.key)
	if err == nil {
		err = a.sameCluster(answer.Header.GetClusterId())
	}
	if err != nil {
		return protocol.Record{}, nil, a.explain("reading the record", err)
	}
	return a.record(answer.Kvs)
}

// Swap makes r the record if the present epoch is r.Epoch-1.
func (a *Arbiter) Swap(ctx context.Context, r protocol.Record) (bool, protocol.Record, error) {
	next, err := arbiter.Marshal(r)
	if err != nil {
		return false, protocol.Record{}, fmt.Errorf("swapping %v: %w", r, err)
	}
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	held, value, err := a.read(ctx)
	if err != nil || held.Epoch != r.Epoch-1 {
		return false, held, err
	}
	unchanged := clientv3.Compare(clientv3.CreateRevision(a.key), "=", 0)
	if value != nil {
		unchanged = clientv3.Compare(clientv3.Value(a.key), "=", string(value))
	}
	answer, err := a.client.Txn(ctx).If(unchanged).Then(clientv3.OpPut(a.key, string(next))).Else(clientv3.OpGet(a.key)).Commit()
	if err == nil {
		err = a.sameCluster(answer.Header.GetClusterId())
	}
	if err != nil {
		return false, protocol.Record{}, a.explain("swapping the record", err)
	}
	if answer.Succeeded {
		return true, r, nil
	}
	held, _, err = a.record(answer.Responses[0].GetResponseRange().GetKvs())
	return false, held, err
}

// record reads the record from what etcd has under the key.
func (a *Arbiter) record(kvs []*mvccpb.KeyValue) (protocol.Record, []byte, error) {
	if len(kvs) == 0 {
		return protocol.Record{}, nil, nil
	}
	r, err := arbiter.Unmarshal(kvs[0].Value)
	if err != nil {
		return protocol.Record{}, nil, a.malformed(err)
	}
	return r, kvs[0].Value, nil
}

func (a *Arbiter) malformed(err error) error {
	return arbiter.Errorf(arbiter.Malformed, "find out who wrote to this key; both sides wait until it is a record again", "the key %s of %s: %w", a.key, a.where, err)
}

// sameCluster refuses answers of another cluster than the first.
func (a *Arbiter) sameCluster(id uint64) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.cluster == 0 {
		a.cluster = id
	}
	if id != a.cluster {
		a.split = a.several
	}
	if id == a.cluster && !a.split {
		return nil
	}
	if a.several {
		return arbiter.Errorf(arbiter.OtherCluster, "name members of one cluster, or one witness", "the endpoints %s are not of one cluster: they keep different records", a.where)
	}
	return arbiter.Errorf(arbiter.OtherCluster, "bring the first one back with its data", "another arbiter than at first answers at %s, or the same without its data", a.where)
}

// explain gives an error of etcd a reason and a remedy.
func (a *Arbiter) explain(doing string, err error) error {
	var known *arbiter.Error
	if errors.As(err, &known) {
		return known
	}
	// An error may be gRPC's own or etcd's translation of it.
	code := status.Code(err)
	var etcd rpctypes.EtcdError
	if errors.As(err, &etcd) {
		code = etcd.Code()
	}
	switch {
	case errors.Is(err, context.Canceled):
		return fmt.Errorf("%s of pair %s at %s: %w", doing, a.pair, a.where, err)
	case errors.Is(err, rpctypes.ErrPermissionDenied), errors.Is(err, rpctypes.ErrUserEmpty), code == codes.Unauthenticated, code == codes.PermissionDenied:
		return arbiter.Errorf(arbiter.NotGranted, "make keys for this pair with ftvmm witness grant, and use those", "%s of pair %s at %s: %w", doing, a.pair, a.where, err)
	case code == codes.ResourceExhausted && strings.Contains(err.Error(), "larger than max"):
		return a.malformed(fmt.Errorf("%w: %w", arbiter.ErrNotRecord, err))
	case code == codes.Unavailable, code == codes.DeadlineExceeded, errors.Is(err, context.DeadlineExceeded):
		return arbiter.Errorf(arbiter.NoAnswer, "see that it runs and that this host reaches it; a pair that needs it waits", "%s of pair %s at %s: %w", doing, a.pair, a.where, err)
	}
	return fmt.Errorf("%s of pair %s at %s: %w", doing, a.pair, a.where, err)
}
