// SPDX-License-Identifier: Apache-2.0
#include "connection.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <new>

namespace tcmu::nbd {

namespace {

constexpr size_t kVectors = 64;

std::vector<uint8_t> simpleReply(const Request& request) {
  std::vector<uint8_t> head;
  head.reserve(kSimpleReplyBytes);
  Writer(head)
      .put(kSimpleReplyMagic)
      .put(static_cast<uint32_t>(request.error()))
      .put(request.cookie);
  return head;
}

Writer chunk(std::vector<uint8_t>& head, const Request& request, Chunk type, size_t length) {
  head.reserve(kChunkHeaderBytes + 8);
  return Writer(head)
      .put(kStructuredReplyMagic)
      .put(kChunkDone)
      .put(static_cast<uint16_t>(type))
      .put(request.cookie)
      .put(static_cast<uint32_t>(length));
}

std::vector<uint8_t> structuredReply(const Request& request) {
  std::vector<uint8_t> head;
  if (request.error() != Errno::none) {
    const std::string& message = request.message();
    chunk(head, request, Chunk::error, 6 + message.size())
        .put(static_cast<uint32_t>(request.error()))
        .put(static_cast<uint16_t>(message.size()))
        .text(message);
  } else if (request.type == CommandType::read && request.length > 0) {
    chunk(head, request, Chunk::offsetData, 8 + size_t{request.length}).put(request.offset);
  } else if (request.type == CommandType::blockStatus) {
    Writer writer =
        chunk(head, request, Chunk::blockStatus, 4 + 8 * request.extents().size()).put(kAllocationId);
    for (const Extent& extent : request.extents()) writer.put(extent.bytes).put(extent.flags);
  } else {
    chunk(head, request, Chunk::none, 0);
  }
  return head;
}

}  // namespace

std::span<const uint8_t> Connection::Reply::body() const {
  if (!request || request->type != CommandType::read || request->error() != Errno::none) return {};
  return request->buffer.bytes();
}

Connection::Connection(Host& host, const Config& config, UniqueFd socket, uint64_t id,
                       sim::TimePoint deadline)
    : host_(host),
      id_(id),
      socket_(std::move(socket)),
      negotiation_(config),
      deadline_(deadline),
      input_(kInputBytes) {
  const int one = 1;  // fails where the socket is not TCP
  setsockopt(socket_.get(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  std::vector<uint8_t> greeting;
  negotiation_.greet(greeting);
  queue(std::move(greeting));
}

uint32_t Connection::interest() const {
  uint32_t events = output_.empty() ? 0u : uint32_t{EPOLLOUT};
  const bool reads = phase_ == Phase::handshake || (phase_ == Phase::transmission && mayTake());
  if (reads && !sawEnd_) events |= EPOLLIN;
  return events;
}

void Connection::onEvents(uint32_t events) {
  // While it is not read, nothing but the death of its peer is news: no reply can reach that.
  if (!(interest() & EPOLLIN) && events & (EPOLLHUP | EPOLLERR)) return drop();
  if (interest() & EPOLLIN && events & (EPOLLIN | EPOLLHUP | EPOLLERR)) receive();
}

void Connection::receive() {
  if (inputStart_ == inputEnd_) inputStart_ = inputEnd_ = 0;
  if (inputEnd_ == input_.size()) {
    // Every message but a payload is smaller than the buffer, and fits once it begins at the front.
    std::copy(input_.begin() + static_cast<long>(inputStart_), input_.end(), input_.begin());
    inputEnd_ -= inputStart_;
    inputStart_ = 0;
  }
  iovec vectors[2];
  size_t direct = 0;
  msghdr message{};
  message.msg_iov = vectors;
  if (incoming_ && inputStart_ == inputEnd_) {
    const auto rest = incoming_->buffer.bytes().subspan(payloadTaken_);
    direct = rest.size();
    vectors[message.msg_iovlen++] = {rest.data(), direct};
  }
  const size_t room = input_.size() - inputEnd_;
  if (room > 0) vectors[message.msg_iovlen++] = {input_.data() + inputEnd_, room};
  if (message.msg_iovlen == 0) return;
  const ssize_t n = recvmsg(socket_.get(), &message, MSG_DONTWAIT);
  if (n < 0) {
    if (errno != EAGAIN && errno != EINTR) drop();
    return;
  }
  if (n == 0) {
    // What is under way is answered: the client may have closed its sending half only.
    sawEnd_ = true;
    return shutDown();
  }
  const size_t intoPayload = std::min(direct, static_cast<size_t>(n));
  payloadTaken_ += intoPayload;
  inputEnd_ += static_cast<size_t>(n) - intoPayload;
  parse();
}

void Connection::parse() {
  while (socket_) {
    const bool more = phase_ == Phase::handshake      ? parseHandshake()
                      : phase_ == Phase::transmission ? parseRequest()
                                                      : false;
    if (!more) return;
  }
}

// --- handshake ---

bool Connection::parseHandshake() {
  std::span<const uint8_t> in{input_.data() + inputStart_, inputEnd_ - inputStart_};
  const size_t before = in.size();
  std::vector<uint8_t> out;
  const Negotiation::Step taken = negotiation_.take(in, out);
  inputStart_ += before - in.size();
  step(taken, std::move(out));
  return taken != Negotiation::Step::incomplete;
}

void Connection::step(Negotiation::Step step, std::vector<uint8_t> out) {
  if (!out.empty()) queue(std::move(out));
  switch (step) {
    case Negotiation::Step::describe:
      phase_ = Phase::describing;
      host_.describe(*this);
      break;
    case Negotiation::Step::transmission: phase_ = Phase::transmission; break;
    case Negotiation::Step::tls: upgrade(); break;
    case Negotiation::Step::end: phase_ = Phase::ending; break;
    default: break;
  }
}

void Connection::described(const std::optional<Disk>& disk) {
  if (phase_ != Phase::describing) return;
  std::vector<uint8_t> out;
  phase_ = Phase::handshake;
  const Negotiation::Step taken = negotiation_.described(disk, out);
  step(taken, std::move(out));
  parse();
}

void Connection::upgrade() {
  transmit();
  int ends[2];
  // Bytes behind STARTTLS were sent in plain text, and must not be taken for the client's.
  if (!socket_ || !output_.empty() || inputStart_ != inputEnd_ ||
      socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) < 0)
    return drop();
  UniqueFd encrypted = std::move(socket_);
  socket_.reset(ends[0]);
  negotiation_.secured();
  host_.startTls(*this, std::move(encrypted), UniqueFd(ends[1]));
}

// --- transmission ---

bool Connection::parseRequest() {
  const size_t available = inputEnd_ - inputStart_;
  if (discard_ > 0) {
    const size_t dropped = static_cast<size_t>(std::min<uint64_t>(discard_, available));
    discard_ -= dropped;
    inputStart_ += dropped;
    return discard_ == 0;
  }
  if (incoming_) return takePayload();
  if (!mayTake() || available < kRequestBytes) return false;
  const uint8_t* header = input_.data() + inputStart_;
  if (load<uint32_t>(header) != kRequestMagic) {
    drop();  // where the next request begins can't be known
    return false;
  }
  auto request = std::make_unique<Request>();
  request->flags = load<uint16_t>(header + 4);
  request->type = static_cast<CommandType>(load<uint16_t>(header + 6));
  request->cookie = load<uint64_t>(header + 8);
  request->offset = load<uint64_t>(header + 16);
  request->length = load<uint32_t>(header + 24);
  inputStart_ += kRequestBytes;
  if (request->type == CommandType::disconnect) {
    shutDown();
    return false;
  }
  request->check(disk(), negotiation_.allocationContext());
  if (request->error() == Errno::none) {
    try {
      request->buffer.allocate(request->bufferBytes(), host_.pool());
    } catch (const std::bad_alloc&) {
      request->fail(Errno::io, "no memory");
    }
  }
  underWay_++;
  held_ += request->buffer.bytes().size();
  if (request->error() != Errno::none) {
    if (request->type == CommandType::write) discard_ = request->length;
    finished(std::move(request));
  } else if (request->type == CommandType::write && request->length > 0) {
    incoming_ = std::move(request);
    payloadTaken_ = 0;
  } else {
    host_.start(*this, std::move(request));
  }
  return true;
}

bool Connection::takePayload() {
  const auto rest = incoming_->buffer.bytes().subspan(payloadTaken_);
  const size_t part = std::min(rest.size(), inputEnd_ - inputStart_);
  std::copy_n(input_.data() + inputStart_, part, rest.data());
  inputStart_ += part;
  payloadTaken_ += part;
  if (part < rest.size()) return false;
  host_.start(*this, std::move(incoming_));
  return true;
}

void Connection::finished(std::unique_ptr<Request> request) {
  if (!socket_) {
    underWay_--;
    return;
  }
  const bool structured = negotiation_.structured() && (request->type == CommandType::read ||
                                                        request->type == CommandType::blockStatus ||
                                                        request->error() != Errno::none);
  std::vector<uint8_t> head = structured ? structuredReply(*request) : simpleReply(*request);
  queue(std::move(head), std::move(request));
}

// --- output ---

void Connection::queue(std::vector<uint8_t> head, std::unique_ptr<Request> request) {
  output_.push_back({std::move(head), std::move(request)});
}

void Connection::flush() {
  for (;;) {
    transmit();
    // Replies that are sent make room for requests that were received with others.
    const size_t before = inputStart_;
    if (phase_ == Phase::transmission && before != inputEnd_) parse();
    if (inputStart_ == before) break;
  }
  if (phase_ == Phase::ending && output_.empty() && underWay_ == 0) socket_.reset();
}

void Connection::transmit() {
  while (socket_ && !output_.empty()) {
    iovec vectors[kVectors];
    msghdr message{};
    message.msg_iov = vectors;
    size_t offered = 0;
    size_t skip = outputSent_;
    for (const Reply& reply : output_) {
      if (message.msg_iovlen + 2 > kVectors) break;
      for (const std::span<const uint8_t> part : {std::span<const uint8_t>(reply.head), reply.body()}) {
        const size_t skipped = std::min(skip, part.size());
        skip -= skipped;
        if (skipped == part.size()) continue;
        vectors[message.msg_iovlen++] = {const_cast<uint8_t*>(part.data() + skipped),
                                         part.size() - skipped};
        offered += part.size() - skipped;
      }
    }
    const ssize_t n = sendmsg(socket_.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0) {
      if (errno == EINTR) continue;
      if (errno != EAGAIN) drop();
      return;
    }
    outputSent_ += static_cast<size_t>(n);
    while (!output_.empty() && outputSent_ >= output_.front().bytes()) {
      Reply& sent = output_.front();
      outputSent_ -= sent.bytes();
      if (sent.request) {
        underWay_--;
        held_ -= sent.request->buffer.bytes().size();
      }
      output_.pop_front();
    }
    if (static_cast<size_t>(n) < offered) return;
  }
}

// --- the end ---

void Connection::shutDown() {
  if (incoming_) {
    incoming_.reset();
    underWay_--;
  }
  phase_ = Phase::ending;
}

void Connection::drop() {
  socket_.reset();
  phase_ = Phase::ending;
  for (const Reply& reply : output_)
    if (reply.request) underWay_--;
  output_.clear();
  if (incoming_) {
    incoming_.reset();
    underWay_--;
  }
}

}  // namespace tcmu::nbd
