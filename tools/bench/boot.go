package main

import (
	"context"
	"os"
	"path/filepath"
	"time"

	"github.com/ftvmm/ftvmm/integration/images"
)

// blankDisk is the size in bytes of a disk that nothing boots from: one cylinder for SeaBIOS.
const blankDisk = 2 << 20

// measureSeaBIOS lets the firmware try a disk without a boot sector.
func measureSeaBIOS(ctx context.Context, b *bench, v vm) ([]float64, error) {
	path, err := b.file("blank", func() ([]byte, error) { return make([]byte, blankDisk), nil })
	if err != nil {
		return nil, err
	}
	return timeTo(ctx, v, guest{disk: path}, "No bootable device")
}

// measureGRUB boots GRUB from a disk, up to its prompt.
func measureGRUB(ctx context.Context, b *bench, v vm) ([]float64, error) {
	path, err := b.file("grub", func() ([]byte, error) {
		return images.GRUB(ctx, images.SerialPrompt, "biosdisk", "serial", "terminal", "normal")
	})
	if err != nil {
		return nil, err
	}
	return timeTo(ctx, v, guest{disk: path}, "grub> ")
}

// file returns the path of a file in the run's folder, which make makes the first time.
func (b *bench) file(name string, make func() ([]byte, error)) (string, error) {
	path := filepath.Join(b.dir, name)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	p, err := make()
	if err != nil {
		return "", err
	}
	return path, os.WriteFile(path, p, 0o600)
}

// timeTo measures from process start until the guest has written text.
func timeTo(ctx context.Context, v vm, g guest, text string) ([]float64, error) {
	begun := time.Now()
	m, err := start(ctx, v, g)
	if err != nil {
		return nil, err
	}
	defer m.kill()
	_, last, err := m.when(text)
	return []float64{last.Sub(begun).Seconds()}, err
}
