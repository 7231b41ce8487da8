package net

import (
	"fmt"

	"github.com/ftvmm/ftvmm/devices/virtio"
)

// State is the saved form of a [Device] with its transport. The [Counters] are not in it.
type State struct {
	Transport virtio.State
	MAC       MAC
	Status    uint16 // link and announcement, as the driver reads it
	Offloads  uint64 // feature bits of the Rx offloads that are on
	Filter    FilterState
	Backlog   [][]byte // frames, header first
}

// FilterState is what the driver wants to receive.
type FilterState struct {
	Promiscuous, AllMulticast, AllUnicast bool
	NoMulticast, NoUnicast, NoBroadcast   bool
	Unicast, Multicast                    []MAC
	// The driver has set more addresses than the table holds.
	TooManyUnicast, TooManyMulticast bool
}

// Save returns the state of card and transport.
func (d *Device) Save() State {
	f := &d.filter
	s := State{
		Transport: d.t.Save(),
		MAC:       d.mac(),
		Status:    d.status(),
		Offloads:  d.offloads,
		Filter: FilterState{
			Promiscuous: f.promiscuous, AllMulticast: f.allMulticast, AllUnicast: f.allUnicast,
			NoMulticast: f.noMulticast, NoUnicast: f.noUnicast, NoBroadcast: f.noBroadcast,
			Unicast:        append([]MAC(nil), f.unicast...),
			Multicast:      append([]MAC(nil), f.multicast...),
			TooManyUnicast: f.tooManyUnicast, TooManyMulticast: f.tooManyMulticast,
		},
	}
	for i := range d.backlog.n {
		s.Backlog = append(s.Backlog, append([]byte(nil), d.backlog.at(i)...))
	}
	return s
}

// Restore sets the state of card and transport, or none of it. It tells the network
// nothing: see Reissue.
func (d *Device) Restore(s State) error {
	if s.Status&^(statusLinkUp|statusAnnounce) != 0 || s.Offloads&^guestOffloads != 0 ||
		s.Offloads&^s.Transport.Features != 0 || len(s.Backlog) > MaxBacklog ||
		len(s.Filter.Unicast) > MaxFilter || len(s.Filter.Multicast) > MaxFilter {
		return fmt.Errorf("net: saved status %#x, offloads %#x, %d frames, %d and %d addresses",
			s.Status, s.Offloads, len(s.Backlog), len(s.Filter.Unicast), len(s.Filter.Multicast))
	}
	for i, f := range s.Backlog {
		if len(f) < HeaderSize+ethernetHeader || len(f) > MaxFrame {
			return fmt.Errorf("net: saved frame %d has %d bytes", i, len(f))
		}
	}
	if err := d.t.Restore(s.Transport); err != nil {
		return fmt.Errorf("net: %w", err)
	}
	d.setMAC(s.MAC)
	d.setStatus(s.Status)
	d.offloads = s.Offloads
	f := s.Filter
	d.filter = filter{
		promiscuous: f.Promiscuous, allMulticast: f.AllMulticast, allUnicast: f.AllUnicast,
		noMulticast: f.NoMulticast, noUnicast: f.NoUnicast, noBroadcast: f.NoBroadcast,
		unicast:        append(d.filter.unicast[:0], f.Unicast...),
		multicast:      append(d.filter.multicast[:0], f.Multicast...),
		tooManyUnicast: f.TooManyUnicast, tooManyMulticast: f.TooManyMulticast,
	}
	d.backlog.clear()
	for _, frame := range s.Backlog {
		d.backlog.push(frame)
	}
	return nil
}

// Reset puts the card with its transport into the power-on state. The link is the
// network's, and stays.
func (d *Device) Reset() { d.t.Reset() }
