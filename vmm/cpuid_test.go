package vmm

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// However many processors the host has, and on whichever of them it was asked, the guest
// finds one.
func TestCPUIDTellsOfOneProcessor(t *testing.T) {
	host := func(apicID uint32) []kvm.CPUIDEntry {
		return []kvm.CPUIDEntry{
			{Function: leafFeatures, Ebx: apicID<<24 | 64<<16 | 8<<8, Edx: edxHTT},
			{Function: leafCacheIntel, Eax: 0xfc01c121},
			{Function: leafTopology, Eax: 1, Ebx: 2, Ecx: 0x100, Edx: apicID},
			{Function: leafTopology, Index: 1, Eax: 7, Ebx: 64, Ecx: 0x201, Edx: apicID},
			{Function: leafExtSizes, Eax: 0x3030, Ecx: 0x603f},
			{Function: leafExtTopo, Eax: apicID, Ebx: 0x100, Ecx: 0x300},
		}
	}
	table := CPUIDTable(host(5), 0)
	require.Equal(t, table, CPUIDTable(host(9), 0))
	for _, e := range table {
		switch e.Function {
		case leafFeatures:
			require.Equal(t, uint32(1<<16|8<<8), e.Ebx)
			require.Zero(t, e.Edx&edxHTT)
		case leafCacheIntel:
			require.Zero(t, e.Eax>>14, "no cache is shared")
		case leafTopology:
			require.Zero(t, e.Ebx)
			require.Zero(t, e.Edx)
		case leafExtSizes:
			require.Zero(t, e.Ecx)
			require.Equal(t, uint32(0x3030), e.Eax)
		case leafExtTopo:
			require.Zero(t, e.Eax|e.Ebx|e.Ecx)
		}
	}
}
