// Package file is an arbiter made of files: one for each epoch, on storage that both sides see.
//
// The file of epoch N+1 can be made once only, so making it is the test-and-set. Its content is
// written and synced under a private name first, and then linked to the epoch's name, which fails
// if that exists: so a record is there whole or not at all, whenever its writer dies. link(2) is
// used rather than open(2) with O_EXCL alone because the latter makes the name before the
// content: a reader in between would find a record that it cannot read, and a crash in between
// would leave one for ever. The private file is what is opened with O_EXCL. Locks are not used:
// over NFS and after crashes they promise less than a name does.
//
// The storage must make exclusive link atomic among its clients and show a new name to all of
// them: a local file system and NFSv4 do.
//
// No file is ever removed, by us or by hand. If the file of epoch 6 were, a side that was
// stopped between seeing epoch 5 and making epoch 6 could still make it when it wakes, long after
// the other has gone on to epoch 20, and would be live without right. An epoch takes a hundred
// bytes and passes only when something breaks or is mended; so they stay, as a history.
package file

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/ftvmm/ftvmm/lockstep/arbiter"
	"github.com/ftvmm/ftvmm/lockstep/protocol"
)

// prefix and suffix make an epoch's name: "epoch-00000000000000000042.json", digits for the
// longest epoch so that a listing is in order.
const (
	prefix = "epoch-"
	suffix = ".json"
	digits = 20
)

// Arbiter keeps the record of a pair in a directory of its own.
type Arbiter struct{ dir string }

// Open opens the arbiter in a directory, which must exist: making it where the storage is not
// mounted would give each side an arbiter of its own.
func Open(dir string) (*Arbiter, error) {
	info, err := os.Stat(dir)
	if err != nil {
		return nil, fmt.Errorf("opening arbiter: %w", err)
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("opening arbiter: %s is not a directory", dir)
	}
	return &Arbiter{dir}, nil
}

func (a *Arbiter) name(epoch uint64) string {
	return filepath.Join(a.dir, fmt.Sprintf("%s%0*d%s", prefix, digits, epoch, suffix))
}

// epochs returns the epochs that there are files of, in order.
func (a *Arbiter) epochs() ([]uint64, error) {
	entries, err := os.ReadDir(a.dir)
	if err != nil {
		return nil, fmt.Errorf("reading arbiter: %w", err)
	}
	var epochs []uint64
	for _, e := range entries { // sorted by name, and so by epoch
		s, ok := strings.CutPrefix(e.Name(), prefix)
		s, is := strings.CutSuffix(s, suffix)
		if !ok || !is || len(s) != digits {
			continue
		}
		epoch, err := strconv.ParseUint(s, 10, 64)
		if err != nil || epoch == 0 {
			continue
		}
		epochs = append(epochs, epoch)
	}
	return epochs, nil
}

// load reads the record of one epoch.
func (a *Arbiter) load(epoch uint64) (protocol.Record, error) {
	var r protocol.Record
	f, err := os.Open(a.name(epoch))
	if err != nil {
		return r, fmt.Errorf("reading arbiter: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, arbiter.MaxRecord+1))
	if err != nil {
		return r, fmt.Errorf("reading arbiter: %w", err)
	}
	if r, err = arbiter.Unmarshal(data); err != nil {
		return r, fmt.Errorf("reading arbiter: %s: %w", f.Name(), err)
	}
	if r.Epoch != epoch {
		return protocol.Record{}, fmt.Errorf("reading arbiter: %s: %w of this epoch: it holds %v", f.Name(), arbiter.ErrNotRecord, r)
	}
	return r, nil
}

// Read returns the newest record.
func (a *Arbiter) Read(ctx context.Context) (protocol.Record, error) {
	if err := ctx.Err(); err != nil {
		return protocol.Record{}, err
	}
	epochs, err := a.epochs()
	if err != nil {
		return protocol.Record{}, err
	}
	if len(epochs) == 0 {
		return protocol.Record{}, nil
	}
	last := epochs[len(epochs)-1]
	// The listing may come from a cache; asking for a name by itself goes to the server.
	for {
		_, err := os.Stat(a.name(last + 1))
		if errors.Is(err, fs.ErrNotExist) {
			break
		}
		if err != nil {
			return protocol.Record{}, fmt.Errorf("reading arbiter: %w", err)
		}
		last++
	}
	r, err := a.load(last)
	if err != nil {
		return r, err
	}
	// Its writer may have died before it synced the directory; nobody may act on a record that
	// a power failure could undo.
	return r, a.syncDir()
}

// Swap makes r the record if the present epoch is r.Epoch-1.
func (a *Arbiter) Swap(ctx context.Context, r protocol.Record) (bool, protocol.Record, error) {
	if err := arbiter.Check(r); err != nil {
		return false, protocol.Record{}, fmt.Errorf("swapping %v: %w", r, err)
	}
	held, err := a.Read(ctx)
	if err != nil {
		return false, protocol.Record{}, err
	}
	if held.Epoch != r.Epoch-1 {
		return false, held, nil
	}
	if err := a.create(r); errors.Is(err, fs.ErrExist) {
		held, err = a.Read(ctx)
		return false, held, err
	} else if err != nil {
		return false, protocol.Record{}, fmt.Errorf("swapping %v: %w", r, err)
	}
	return true, r, nil
}

// create makes the record's file; the error is fs.ErrExist if its epoch is taken.
func (a *Arbiter) create(r protocol.Record) error {
	data, err := arbiter.Marshal(r)
	if err != nil {
		return err
	}
	// os.CreateTemp opens with O_EXCL. A name that begins with a dot is no epoch's.
	f, err := os.CreateTemp(a.dir, ".bid-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // what stays behind is in nobody's way
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		return err
	}
	if err := os.Link(f.Name(), a.name(r.Epoch)); err != nil {
		return err
	}
	return a.syncDir()
}

func (a *Arbiter) syncDir() error {
	d, err := os.Open(a.dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
