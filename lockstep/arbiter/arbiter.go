// Package arbiter is the test-and-set that lets one side only of a pair go on.
//
// An arbiter keeps one [protocol.Record] for a pair and changes it only by compare-and-swap from
// epoch N to epoch N+1, in a place that both sides see and that outlives both. It need not be
// fast, and it may be out of reach: then a side that needs it waits, frozen. What it must never do
// is let two swaps to one epoch succeed, or show an older record after a newer one.
//
// Package file keeps the record on storage that both sides mount, package etcd in an etcd cluster, which
// package witness can be. Package open makes one of them from what a user wrote.
package arbiter

import (
	"context"

	"github.com/ftvmm/ftvmm/lockstep/protocol"
)

// Arbiter keeps the record of one pair. Its methods may be called from several goroutines. An
// error leaves open whether a swap took effect, now or later; the protocol handles that.
type Arbiter interface {
	// Read returns the record, the zero Record if there is none. It is linearizable: it shows
	// every swap that was answered before the call.
	Read(ctx context.Context) (protocol.Record, error)
	// Swap makes r the record if the present epoch is r.Epoch-1. It returns whether it did, and
	// the record as it is then.
	Swap(ctx context.Context, r protocol.Record) (bool, protocol.Record, error)
}

// Serve carries out a request of a node. On an error there is no answer, and the node asks again.
func Serve(ctx context.Context, a Arbiter, r protocol.Request) (protocol.Answer, error) {
	if !r.Swap {
		held, err := a.Read(ctx)
		return protocol.Answer{ID: r.ID, Record: held}, err
	}
	swapped, held, err := a.Swap(ctx, r.Record)
	return protocol.Answer{ID: r.ID, Swapped: swapped, Record: held}, err
}
