/* What passes through a network card, limited and copied. */
#include "net_impl.h"

#include <string.h>

uint64_t net_throttle(const struct vmm_bucket *bytes, const struct vmm_bucket *frames)
{
	uint64_t now, a, b;

	if (!bytes->rate && !frames->rate)
		return 0;
	now = vmm_now();
	a = vmm_bucket_wait(bytes, now);
	b = vmm_bucket_wait(frames, now);
	return a > b ? a : b;
}

void net_charge(struct vmm_bucket *bytes, struct vmm_bucket *frames, uint64_t len)
{
	uint64_t now;

	if (!bytes->rate && !frames->rate)
		return;
	now = vmm_now();
	vmm_bucket_take(bytes, now, len);
	vmm_bucket_take(frames, now, 1);
}

void net_dump(struct vmm_net *net, const struct iovec *iov, uint32_t nr, uint32_t skip,
	      uint32_t len)
{
	struct vmm_stream *out = net->config.dump;
	struct timespec t;
	uint32_t head[4];

	if (!out)
		return;
	clock_gettime(CLOCK_REALTIME, &t);
	head[0] = (uint32_t)t.tv_sec;
	head[1] = (uint32_t)(t.tv_nsec / 1000);
	head[2] = head[3] = len;
	pthread_mutex_lock(&net->dump_lock);
	if (vmm_stream_room(out) < sizeof(head) + len) {
		net->stats.dump_dropped++;
	} else {
		memcpy(net->dump_record, head, sizeof(head));
		vmm_iov_read(iov, nr, skip, net->dump_record + sizeof(head), len);
		vmm_stream_write(out, net->dump_record, (uint32_t)sizeof(head) + len);
	}
	pthread_mutex_unlock(&net->dump_lock);
}

struct limit_call {
	struct vmm_net *net;
	const struct vmm_net_config *config;
};

static void set_limits(void *arg)
{
	const struct limit_call *call = arg;
	struct vmm_net_config *own = &call->net->config;

	own->rx_bytes = call->config->rx_bytes;
	own->rx_frames = call->config->rx_frames;
	own->tx_bytes = call->config->tx_bytes;
	own->tx_frames = call->config->tx_frames;
	for (uint32_t i = 0; i < own->pairs; i++) {
		vmm_timer_set(&call->net->pairs[i].rx.timer, 0);
		vmm_timer_set(&call->net->pairs[i].tx.timer, 0);
	}
	net_again(call->net);
}

void vmm_net_limit(struct vmm_net *net, const struct vmm_net_config *config)
{
	struct limit_call call = { net, config };

	vmm_loop_call(net->loop, set_limits, &call);
}
