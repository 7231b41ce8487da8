package pair

import (
	"errors"
	"os"
	"path/filepath"
)

// syncParent makes an entry of a directory durable.
func syncParent(path string) error {
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
