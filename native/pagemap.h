/* One bit for each 4 KiB page of guest RAM. */
#ifndef VMM_PAGEMAP_H
#define VMM_PAGEMAP_H

#include "core.h"

struct vmm_pagemap;

/* All clear. Of the ranges there are now; what lies elsewhere never is set. NULL: no memory. */
struct vmm_pagemap *vmm_pagemap_create(const struct vmm_mem *mem);
void vmm_pagemap_destroy(struct vmm_pagemap *map);
void vmm_pagemap_reset(struct vmm_pagemap *map);
/* The pages wholly within [gpa, gpa+len), any addresses. */
void vmm_pagemap_set(struct vmm_pagemap *map, uint64_t gpa, uint64_t len, bool on);
/* Whether every page of [gpa, gpa+len), whole pages in one range, is set. */
bool vmm_pagemap_full(const struct vmm_pagemap *map, uint64_t gpa, uint64_t len);
/* The first run of set pages at or above gpa; it ends with its range at the latest. */
bool vmm_pagemap_next(const struct vmm_pagemap *map, uint64_t gpa, uint64_t *start, uint64_t *len);

#endif
