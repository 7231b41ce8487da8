package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
)

const (
	diskSize  = 256 << 20
	diskBlock = 4 << 10
)

// blocks measures random requests of one size to a virtio disk.
func blocks(op string, depth, n int) group {
	return group{
		figures: []figure{{
			name: fmt.Sprintf("blk-%s-qd%d", op, depth), what: fmt.Sprintf("random 4 KiB %ss, %d in flight", op, depth),
			unit: "req/s", scale: 1, target: 1, more: true,
		}},
		measure: func(ctx context.Context, b *bench, v vm) ([]float64, error) {
			if err := b.makeDisk(); err != nil {
				return nil, err
			}
			m, err := b.startGuest(ctx, v, "blk", guest{disk: b.disk, append: fmt.Sprintf("mode=bench op=%s qd=%d n=%d bs=%d", op, depth, n, diskBlock)})
			if err != nil {
				return nil, err
			}
			took, err := m.between("bench start\n", "bench done")
			if err = errors.Join(err, m.wait()); err != nil {
				return nil, err
			}
			return []float64{float64(n) / took.Seconds()}, nil
		},
	}
}

// makeDisk makes the image that both programs use: without holes, which are read faster.
func (b *bench) makeDisk() error {
	if b.disk != "" {
		return nil
	}
	path := filepath.Join(b.dir, "disk")
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	data := make([]byte, 1<<20)
	random := rand.NewChaCha8([32]byte{})
	for written := 0; written < diskSize && err == nil; written += len(data) {
		_, _ = random.Read(data) // never fails
		_, err = f.Write(data)
	}
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		b.disk = path
	}
	return err
}
