package vmm

import (
	"sort"

	"github.com/ftvmm/ftvmm/firmware"
)

// description is what firmware, and by its tables the operating system, is told of the machine.
func (m *Machine) description() firmware.Config {
	c := firmware.Config{
		RAM: m.cfg.Memory, CPUs: m.cfg.CPUs, UUID: m.cfg.UUID,
		COM1: len(m.cfg.Serial) > 0, COM2: len(m.cfg.Serial) > 1,
		PMBase: directPMBase, BootOrder: m.bootOrder(),
	}
	if c.COM1 {
		c.ConsolePort = portCOM1
	}
	return c
}

// bootOrder lists the boot devices by their index.
func (m *Machine) bootOrder() []string {
	type entry struct {
		index int
		path  string
	}
	var l []entry
	slot := firstSlot
	for _, d := range m.cfg.Disks {
		if d.BootIndex > 0 {
			l = append(l, entry{d.BootIndex, firmware.BootDisk(slot)})
		}
		slot++
	}
	for _, n := range m.cfg.NICs {
		if n.BootIndex > 0 {
			l = append(l, entry{n.BootIndex, firmware.BootNIC(slot)})
		}
		slot++
	}
	sort.SliceStable(l, func(i, j int) bool { return l[i].index < l[j].index })
	var paths []string
	for _, e := range l {
		paths = append(paths, e.path)
	}
	return paths
}
