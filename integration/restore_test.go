package integration

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/vmm"
)

// A machine that is saved at some exit and restored in another has the same future as one
// that went on: every later exit has the same digest, and the memory at the end is equal.
func TestRestoredMachineHasTheSameFuture(t *testing.T) {
	for _, c := range []struct {
		guest, cmdline string
		disk           int
		exact          bool // memory at the end is the same byte for byte
	}{
		{"hello", "a=b", 0, true},
		{"storm", "mode=all n=300 cpl=0", 0, true},
		{"storm", "mode=all n=300 cpl=3", 0, true},
		{"compute", "rounds=2 exit_every=1000", 0, true},
		{"timers", "", 0, true},
		{"irq", "", 0, true},
		{"blk", "mode=verify", 8 << 20, true},
	} {
		t.Run(c.guest+" "+c.cmdline, func(t *testing.T) {
			disk := func() [][]byte {
				if c.disk == 0 {
					return nil
				}
				return [][]byte{make([]byte, c.disk)}
			}
			var whole trace
			m, err := vmm.New(scriptedConfig(guest(t, c.guest), c.cmdline, disk(), &whole))
			require.NoError(t, err)
			defer m.Close()
			end := run(t, m, time.Minute)
			require.Equal(t, vmm.ExitDebugExit, end.Reason, "%+v\n%s", end, whole.console.String())
			require.Zero(t, end.Code, whole.console.String())
			n := uint64(len(whole.exits))
			var again trace
			twin, err := vmm.New(scriptedConfig(guest(t, c.guest), c.cmdline, disk(), &again))
			require.NoError(t, err)
			require.Equal(t, end, run(t, twin, time.Minute))
			requireSameExits(t, &whole, &again)
			requireSameMemory(t, m, twin)
			require.NoError(t, twin.Close())
			t.Logf("%d exits", n)

			for _, at := range []uint64{n / 7, n / 2, n - n/5} {
				path := filepath.Join(t.TempDir(), "saved")
				disks := disk()
				var before trace
				cfg := scriptedConfig(guest(t, c.guest), c.cmdline, disks, &before)
				var first *vmm.Machine
				saved := make(chan error, 1)
				observe := cfg.Observe
				cfg.Observe = func(r *vmm.ExitRecord) {
					observe(r)
					if r.Pos.Exit == at && len(saved) == 0 {
						saved <- nil
						go func() {
							<-saved
							// Paused, so that it does not change its disk after the save.
							err := first.Pause(context.Background())
							if err == nil {
								err = first.Save(context.Background(), path)
							}
							saved <- err
							first.Quit()
						}()
					}
				}
				first, err = vmm.New(cfg)
				require.NoError(t, err)
				_, err = first.Run(context.Background())
				require.NoError(t, err)
				require.NoError(t, <-saved)
				require.NoError(t, first.Close())

				var after trace
				second, err := vmm.New(scriptedConfig(guest(t, c.guest), c.cmdline, disks, &after))
				require.NoError(t, err)
				require.NoError(t, second.Restore(path))
				got := run(t, second, time.Minute)
				require.Equal(t, end, got)
				require.NotEmpty(t, after.exits)
				require.LessOrEqual(t, after.first, uint64(len(before.exits))+2, "no gap between the two halves")
				t.Logf("saved at exit %d, restored before %d", at, after.first)
				requireSameExits(t, &whole, &after)
				require.Equal(t, whole.console.String()[whole.console.Len()-after.console.Len():], after.console.String())
				if c.exact {
					requireSameMemory(t, m, second)
				}
				require.NoError(t, second.Close())
				st, err := os.Stat(path)
				require.NoError(t, err)
				t.Logf("saved at exit %d of %d: %d bytes", after.first, n, st.Size())
			}
		})
	}
}

func requireSameMemory(t testing.TB, a, b *vmm.Machine) {
	t.Helper()
	ra, rb := a.Memory().Regions(), b.Memory().Regions()
	require.Equal(t, len(ra), len(rb))
	for i := range ra {
		if bytes.Equal(ra[i].Bytes, rb[i].Bytes) {
			continue
		}
		for o := range ra[i].Bytes {
			if ra[i].Bytes[o] != rb[i].Bytes[o] {
				t.Fatalf("memory differs first at %#x: %#x and %#x", ra[i].Base+uint64(o), ra[i].Bytes[o], rb[i].Bytes[o])
			}
		}
	}
}
