package witness

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync/atomic"

	"go.uber.org/zap/zapcore"
	"google.golang.org/grpc/credentials"
)

// core passes on what etcd logs with zap. While etcd starts only errors are passed on: its warnings of that time
// are about ways of running it that are not ours.
type core struct {
	log   *slog.Logger
	ready *atomic.Bool
}

func newCore(log *slog.Logger) core {
	return core{log.With("part", "etcd"), new(atomic.Bool)}
}

// Enabled reports whether entries of a level are logged at all.
func (c core) Enabled(level zapcore.Level) bool {
	return level >= zapcore.ErrorLevel || level == zapcore.WarnLevel && c.ready.Load()
}

// With returns a core that adds fields.
func (c core) With(fields []zapcore.Field) zapcore.Core {
	return core{c.log.With(attrs(fields)...), c.ready}
}

// harmless are messages of etcd about new data: for a moment there is no term of Raft in its database. It looks again
// a few seconds later, and what it looks for matters to those only who go back to an older etcd.
var harmless = []string{"Failed to detect schema version", "failed to update storage version"}

// Check adds the core to those that write an entry.
func (c core) Check(e zapcore.Entry, to *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) && !slices.Contains(harmless, e.Message) {
		return to.AddCore(e, c)
	}
	return to
}

// Write logs an entry.
func (c core) Write(e zapcore.Entry, fields []zapcore.Field) error {
	level := slog.LevelWarn
	if e.Level > zapcore.WarnLevel {
		level = slog.LevelError
	}
	c.log.Log(context.Background(), level, e.Message, attrs(fields)...)
	return nil
}

// Sync does nothing: slog writes at once.
func (core) Sync() error { return nil }

func attrs(fields []zapcore.Field) []any {
	var out []any
	for _, f := range fields {
		m := zapcore.NewMapObjectEncoder()
		f.AddTo(m)
		for k, v := range m.Fields { // one, or those of one object
			out = append(out, slog.Any(k, v))
		}
	}
	return out
}

// loud logs the handshakes that fail: a host with the wrong keys hears only that it is refused.
type loud struct {
	credentials.TransportCredentials
	log *slog.Logger
}

// ServerHandshake does the server's part of a handshake.
func (l loud) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := l.TransportCredentials.ServerHandshake(c)
	if err != nil && !errors.Is(err, io.EOF) {
		l.log.Warn("connection refused", "from", c.RemoteAddr().String(), "error", err.Error())
	}
	return conn, info, err
}
