package arbiter

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/ftvmm/ftvmm/lockstep/protocol"
)

// MaxRecord bounds a record as it is kept, in bytes.
const MaxRecord = 4 << 10

// ErrNotRecord is the error for what is kept where a record should be and is none. It is not the same as
// no record: nobody may act on it, and it is never overwritten.
var ErrNotRecord = errors.New("not a record of a pair")

// Check refuses a record that makes no sense: there is no epoch 0, and the primary is in sync.
func Check(r protocol.Record) error {
	if r.Epoch == 0 || r.InSync&^protocol.Both != 0 || !r.InSync.Has(r.Primary) {
		return ErrNotRecord
	}
	return nil
}

// Marshal returns a record in the form in which it is kept: one line of JSON.
func Marshal(r protocol.Record) ([]byte, error) {
	if err := Check(r); err != nil {
		return nil, err
	}
	data, err := json.Marshal(r)
	return append(data, '\n'), err
}

// Unmarshal returns the record that is kept in this form. Unknown fields are refused: a newer version
// that adds one means something by it.
func Unmarshal(data []byte) (protocol.Record, error) {
	if len(data) > MaxRecord {
		return protocol.Record{}, fmt.Errorf("%w: it is %d bytes long, more than %d", ErrNotRecord, len(data), MaxRecord)
	}
	var r protocol.Record
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return protocol.Record{}, fmt.Errorf("%w: %w", ErrNotRecord, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return protocol.Record{}, fmt.Errorf("%w: something follows it", ErrNotRecord)
	}
	if err := Check(r); err != nil {
		return protocol.Record{}, fmt.Errorf("%w: it says %+v", err, r)
	}
	return r, nil
}
