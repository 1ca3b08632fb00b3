// SPDX-License-Identifier: Apache-2.0
// One client: its socket, its handshake, its requests until their replies are sent.
//
// Lives on one thread. Reads as long as it may keep more requests: what a client has under way is
// bounded in number and in bytes, replies not yet sent included. A client that vanishes leaves its
// commands running: the connection stays, without a socket, until the last has ended.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "../util/unique_fd.h"
#include "negotiation.h"
#include "request.h"

namespace tcmu::nbd {

class Connection {
 public:
  // What the connection asks of its server.
  class Host {
   public:
    // Begins the request, whose buffer is filled.
    virtual void start(Connection& connection, std::unique_ptr<Request> request) = 0;
    // The client has chosen the export: `described` is to be called.
    virtual void describe(Connection& connection) = 0;
    // The client wants TLS: `socket` is its end, with nothing read of it that belongs to TLS. What
    // is decrypted comes and goes through `plain`.
    virtual void startTls(Connection& connection, UniqueFd socket, UniqueFd plain) = 0;
    virtual sim::BufferPool* pool() = 0;

   protected:
    ~Host() = default;
  };

  Connection(Host& host, const Config& config, UniqueFd socket, uint64_t id,
             sim::TimePoint deadline);

  uint64_t id() const { return id_; }
  // -1 once the client is gone.
  int fd() const { return socket_.get(); }
  // What to poll for: EPOLL bits.
  uint32_t interest() const;
  // The handshake must be over by then.
  sim::TimePoint deadline() const {
    return phase_ == Phase::transmission ? sim::TimePoint::max() : deadline_;
  }

  void onEvents(uint32_t events);
  void described(const std::optional<Disk>& disk);
  // The request has ended, well or not.
  void finished(std::unique_ptr<Request> request);
  // Sends what can be sent, and takes what waited for that.
  void flush();
  // No new requests; closes when the replies of those under way are sent.
  void shutDown();
  // Closes at once.
  void drop();

  // Nothing is left of it.
  bool over() const { return !socket_ && underWay_ == 0; }
  const Disk& disk() const { return negotiation_.disk(); }
  size_t underWay() const { return underWay_; }

 private:
  enum class Phase { handshake, describing, transmission, ending };

  struct Reply {
    std::vector<uint8_t> head;
    std::unique_ptr<Request> request;  // its buffer follows, for a read that went well
    std::span<const uint8_t> body() const;
    size_t bytes() const { return head.size() + body().size(); }
  };

  static constexpr size_t kInputBytes = 128 << 10;
  static constexpr size_t kMaxUnderWay = 256;
  static constexpr size_t kMaxHeldBytes = 64u << 20;

  bool mayTake() const {
    return underWay_ < kMaxUnderWay && (underWay_ == 0 || held_ < kMaxHeldBytes);
  }
  void receive();
  void parse();
  bool parseHandshake();
  void step(Negotiation::Step step, std::vector<uint8_t> out);
  bool parseRequest();
  bool takePayload();
  void begin(std::unique_ptr<Request> request);
  void upgrade();
  void queue(std::vector<uint8_t> head, std::unique_ptr<Request> request = nullptr);
  void transmit();

  Host& host_;
  const uint64_t id_;
  UniqueFd socket_;
  Negotiation negotiation_;
  const sim::TimePoint deadline_;
  Phase phase_ = Phase::handshake;
  bool sawEnd_ = false;

  std::vector<uint8_t> input_;
  size_t inputStart_ = 0;
  size_t inputEnd_ = 0;
  std::unique_ptr<Request> incoming_;  // a write whose payload is still to come
  size_t payloadTaken_ = 0;
  uint64_t discard_ = 0;  // payload of a refused write

  size_t underWay_ = 0;
  size_t held_ = 0;  // bytes of the buffers of requests under way
  std::deque<Reply> output_;
  size_t outputSent_ = 0;  // of the first reply
};

}  // namespace tcmu::nbd
